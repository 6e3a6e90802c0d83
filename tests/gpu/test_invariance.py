"""TreeSpeculation(deterministic=True) on a GPU: a row's logits are those of its text alone, bit for bit."""

import copy
from unittest import mock

import pytest
import torch
from recorded import RecordedGraphs

import branchwise as bw
import tiny
from branchwise import forward, graphs, layers
from random_drafter import RandomTrees

N = 12


@pytest.fixture
def decode(device, monkeypatch):
    """Tokens and the logits of every step [N, B, V], with graphs or without."""
    recorder = RecordedGraphs() if device.emulated else graphs.CudaGraphs()
    monkeypatch.setattr("branchwise.decoding.tree_speculation.recorder_for", lambda where: recorder)
    if device.emulated:  # so that means take the way they take on a device
        monkeypatch.setattr(forward, "nullcontext", lambda: layers.InvariantMeans("cpu"))

    def run(name, ids, mask, drafter="none", deterministic=True, text=False):
        model = tiny.model(name, torch.bfloat16)
        spec = bw.TreeSpeculation(drafter, adaptive=False, deterministic=deterministic)
        options = {"max_new_tokens": N, "do_sample": False, "eos_token_id": []}
        with device.active():
            model = model if device.emulated else copy.deepcopy(model).cuda()
            inputs = {"inputs": ids.to(model.device), "attention_mask": mask.to(model.device)}
            if text:
                out = model.generate(**inputs, custom_generate=spec, **options)
                assert spec._rounds[model].recorded > 0
                return out[:, ids.shape[1] :].cpu()
            out = model.generate(
                **inputs, custom_generate=spec, return_dict_in_generate=True, output_logits=True, **options
            )
        return out.sequences[:, ids.shape[1] :].cpu(), torch.stack(out.logits).cpu()

    return run


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_any_tree_gives_the_logits_of_no_drafts(name, decode):
    ids, mask = tiny.prompts(2, 11, longest=290)
    plain = decode(name, ids, mask)
    assert equal(decode(name, ids, mask, RandomTrees(plain[0].tolist(), 0)), plain)
    assert torch.equal(decode(name, ids, mask, RandomTrees(plain[0].tolist(), 1), text=True), plain[0])


def test_without_it_trees_change_bits(decode):
    """So that the test above can fail."""
    ids, mask = tiny.prompts(5, 11, longest=290)
    plain = decode("llama", ids, mask, deterministic=False)
    assert not equal(decode("llama", ids, mask, RandomTrees(plain[0].tolist(), 0), deterministic=False), plain)


def test_a_row_is_the_same_in_any_batch(decode):
    ids, mask = tiny.prompts(3, 12, longest=290)
    tokens, logits = decode("llama", ids, mask)
    own = mask[1].bool()
    assert equal(decode("llama", ids[1:2, own], mask[1:2, own]), (tokens[1:2], logits[:, 1:2]))


def test_means(device):
    """Taken over, to rounding what torch's are, and only where they are over the last dimension."""
    x = torch.randn(3, 5, 33, generator=torch.Generator().manual_seed(0))
    where = "cpu" if device.emulated else "cuda"
    x = x.to(where)
    cases = [(-1, True, 1), (2, False, 1), (1, True, 0), ((1, 2), False, 0), (-1, False, 1)]
    for dim, keepdim, ours in cases:
        expected = x.double().mean(dim, keepdim=keepdim)
        with mock.patch.object(torch, "native_layer_norm", wraps=torch.native_layer_norm) as by:
            with layers.InvariantMeans(where):
                out = x.mean(dim, keepdim=keepdim)
            assert by.call_count == ours
        assert out.shape == expected.shape and out.dtype == x.dtype
        assert torch.allclose(out.double(), expected, atol=1e-6)
    with layers.InvariantMeans(where):
        half = x.half().mean(-1)
    assert half.dtype == torch.float16 and torch.allclose(half, x.mean(-1).half(), atol=1e-3)
