"""Whole decoding runs through the CUDA ops: lossless, as on the CPU. Without a device the emulator runs them."""

import pytest
import torch

import branchwise as bw
import tiny
from branchwise import ops
from random_drafter import RandomTrees


class Counted:
    """Ops, and the names of those that were called."""

    def __init__(self, ops):
        self.ops, self.seen = ops, set()

    def __getattr__(self, name):
        self.seen.add(name)
        return getattr(self.ops, name)


def speculate(model, device, sampled, **options):
    """Plain text, and that of tree speculation with random trees that often contain it."""
    ids, mask = tiny.prompts(3, 7)
    options = {"max_new_tokens": 12, "do_sample": sampled, "attention_mask": mask, **options}
    # Sampled with one seed, the two draw the same tokens.
    plain = model.generate(ids, custom_generate=bw.PositionKeyedSampler(seed=4) if sampled else None, **options)
    truth = [row[ids.shape[1] :].tolist() for row in plain]
    spec = bw.TreeSpeculation(RandomTrees(truth, 1), max_nodes=12, adaptive=False, seed=4)
    device.ops = counted = Counted(device.ops)
    try:
        if device.emulated:
            with device.active():
                ours = model.generate(ids, custom_generate=spec, **options)
        else:
            with device.active():
                moved = {**options, "attention_mask": mask.cuda()}
                ours = model.cuda().generate(ids.cuda(), custom_generate=spec, **moved)
            assert ours.is_cuda
    finally:
        model.cpu()
        device.ops = counted.ops
    assert {"tree_attention", "append_kv", "commit_kv", "verify_sample" if sampled else "verify_greedy"} <= counted.seen
    assert spec.stats.accepted > 0
    return plain, ours.cpu()


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_tree_speculation_equals_plain_generate(name, sampled, device):
    plain, ours = speculate(tiny.model(name), device, sampled)
    assert torch.equal(plain, ours)


def test_processors_that_look_at_texts(device):
    plain, ours = speculate(tiny.model("llama"), device, True, repetition_penalty=1.3, top_k=20)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}], ids=str)
def test_logits_that_are_no_distribution_are_an_exception(options, device):
    """The ops mark such rows, as they cannot throw; a token -1 must not get out, nor the loop wait for it forever."""
    model = tiny.model("llama")
    hook = model.lm_head.register_forward_hook(lambda *args: torch.full_like(args[2], torch.nan))
    ids = torch.ones(1, 4, dtype=torch.int64)
    try:
        with device.active(), pytest.raises(RuntimeError, match="neither NaN nor"):
            on = model if device.emulated else model.cuda()
            spec = bw.TreeSpeculation("none")
            on.generate(ids.to(on.device), custom_generate=spec, max_new_tokens=3, do_sample=True, **options)
    finally:
        hook.remove()
        model.cpu()


def test_what_runs_on_the_cpu_only_says_so():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = tiny.model("llama").cuda()
    ids = torch.ones(1, 3, dtype=torch.int64, device="cuda")
    try:
        with pytest.raises(ValueError, match="decodes so on the CPU only" if ops.CUDA_LOADED else "built without CUDA"):
            model.generate(ids, custom_generate=bw.BestOfN(2, None), do_sample=True)
    finally:
        model.cpu()
