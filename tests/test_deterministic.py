"""TreeSpeculation(deterministic=True): a row's logits are those of its text alone, bit for bit, in every dtype."""

import pytest
import torch

import branchwise as bw
import tiny
from random_drafter import RandomTrees
from test_model_drafters import DRAFTERS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
N = 24  # new tokens
#: Experts see a few rows each, whose number nobody chooses.
DENSE = [name for name in tiny.CONFIGS if name not in ("gpt_oss", "qwen3_moe")]


def run(model, ids, mask, drafter="none", deterministic=True, **options):
    """Tokens, and the logits of every step [N, B, V]."""
    spec = bw.TreeSpeculation(drafter, adaptive=False, deterministic=deterministic, seed=options.pop("seed", None))
    options = {"max_new_tokens": N, "do_sample": False, "eos_token_id": [], **options}
    out = model.generate(
        ids, attention_mask=mask, custom_generate=spec, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", DENSE)
def test_any_tree_gives_the_logits_of_no_drafts(name, batch, dtype):
    model = tiny.model(name, dtype)
    ids, mask = tiny.prompts(batch, 11, longest=300)
    plain = run(model, ids, mask)
    for seed in range(3):
        assert equal(run(model, ids, mask, RandomTrees(plain[0].tolist(), seed)), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_without_it_trees_change_bits(dtype):
    """So that the test above can fail."""
    ids, mask = tiny.prompts(5, 11, longest=300)
    same = []
    for name in ("llama", "qwen3", "gpt_neox"):
        model = tiny.model(name, dtype)
        plain = run(model, ids, mask, deterministic=False)
        same.append(equal(run(model, ids, mask, RandomTrees(plain[0].tolist(), 0), deterministic=False), plain))
    assert not all(same)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_a_row_is_the_same_in_any_batch(name, dtype):
    model = tiny.model(name, dtype)
    ids, mask = tiny.prompts(5, 12, longest=300)
    tokens, logits = run(model, ids, mask)
    for b in range(5):
        own = mask[b].bool()
        alone = run(model, ids[b : b + 1, own], mask[b : b + 1, own])
        assert equal(alone, (tokens[b : b + 1], logits[:, b : b + 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_drafter(drafter, dtype):
    """Also those that compute with the target's own layers and store."""
    model = tiny.model("llama", dtype)
    ids, mask = tiny.prompts(3, 13)
    assert equal(run(model, ids, mask, DRAFTERS[drafter](model)), run(model, ids, mask))


def test_rows_that_leave_the_batch_leave_no_trace():
    model = tiny.model("qwen3", torch.bfloat16)
    ids, mask = tiny.prompts(4, 14)
    options = {"max_new_tokens": 40, "eos_token_id": list(range(2, 12))}
    outputs = []
    for drafter in ("none", "trie", "suffix", "auto"):
        spec = bw.TreeSpeculation(drafter)  # deterministic by itself in 16 bits
        for _ in range(2):
            outputs.append(model.generate(ids, attention_mask=mask, custom_generate=spec, do_sample=False, **options))
    assert len({int((row != 0).sum()) for row in outputs[0]}) > 1
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("drafter", ["trie", "suffix"])
def test_sampled_texts(drafter):
    model = tiny.model("llama", torch.bfloat16)
    ids, mask = tiny.prompts(3, 15)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "seed": 3}
    assert equal(run(model, ids, mask, drafter, **options), run(model, ids, mask, **options))


def test_refusals():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 16)
    bw.patch(model, bw.kv.StreamingLLM(64))
    try:
        with pytest.raises(ValueError, match="goes without a KV policy so far, and the model has StreamingLLM"):
            run(model, ids, mask)
        run(model, ids, mask, deterministic=None)
    finally:
        bw.unpatch(model)
