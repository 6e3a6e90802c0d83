"""The masked-diffusion model that comes with the sources: trained, small, and FreeDave's promises on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from branchwise.demo_diffusion import _FOLDER, PROMPTS, load_diffusion, run_diffusion_demo
from branchwise.diffusion import BlockDecoder, EntropyBudget, FreeDave, Static, Threshold, TimeSchedule
from test_diffusion import CACHES, PAIRS

RULES = [Static(), Static(3), Threshold(0.6), EntropyBudget(1.0), TimeSchedule(6)]
NEW = 48


@cache
def load(attention):
    model, tokenizer = load_diffusion(attention=attention)
    batch = tokenizer(list(PROMPTS.values()), return_tensors="pt", padding=True, padding_side="left")
    return model, batch.input_ids, batch.attention_mask


def decode(model, decoder, ids, mask, **options):
    options = {"max_new_tokens": NEW, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=mask, custom_generate=decoder, **options)


def test_the_asset_is_small_and_in_bf16():
    files = list(_FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 20 << 20
    from safetensors import safe_open

    with safe_open(_FOLDER / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


# Under full attention every state is a whole block or text: a minute for the three.
SOME_SLOW = [pytest.param(*pair, marks=[pytest.mark.slow] if pair[0] == "full" else []) for pair in PAIRS]


@pytest.mark.parametrize("attention", CACHES)
def test_it_has_learned_python(attention):
    """A third of this file's tokens masked: far likelier than by their frequencies, under both patterns."""
    model, tokenizer = load_diffusion(attention=attention)
    text = Path(__file__).read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :384]
    masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.33
    with torch.no_grad():
        logits = model(torch.where(masked, model.config.mask_token_id, ids)).logits
    loss = torch.nn.functional.cross_entropy(logits[masked], ids[masked])
    counts = torch.bincount(ids[0], minlength=model.config.vocab_size).float() + 1
    frequencies = (counts / counts.sum()).log()
    assert float(loss) < float(-frequencies[ids[masked]].mean()) - 0.5


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("attention, cache", PAIRS)
def test_freedave_gives_the_static_text(attention, cache, rule):
    model, ids, mask = load(attention)
    static = BlockDecoder(rule, cache=cache)
    wanted = decode(model, static, ids, mask)
    for draft_length in (3, 8):
        dave = FreeDave(rule, draft_length, cache=cache)
        assert torch.equal(decode(model, dave, ids, mask), wanted)
        assert dave.stats.forwards <= static.stats.forwards


@pytest.mark.parametrize("attention, cache", PAIRS)
def test_sampling_with_fixed_noise(attention, cache):
    model, ids, mask = load(attention)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0}
    static = decode(model, BlockDecoder(cache=cache, seed=3), ids, mask, **options)
    assert torch.equal(decode(model, FreeDave(cache=cache, seed=3), ids, mask, **options), static)


@pytest.mark.parametrize("attention, cache", SOME_SLOW)
def test_half_the_forwards(attention, cache):
    """Of static decoding, one token per step, batch 1: over all prompts, with trees of 12 states. Measured: 0.46 under
    the block-causal pattern; under the full one 0.49, and 0.53 with approximate caches, which begin every block with a
    forward of the whole text."""
    model, ids, mask = load(attention)
    forwards = []
    for decoder in (BlockDecoder(cache=cache), FreeDave(draft_length=12, least_chance=0.02, cache=cache)):
        forwards.append(0)
        for row in range(len(ids)):
            decode(model, decoder, ids[row : row + 1, mask[row].bool()], None, max_new_tokens=96)
            forwards[-1] += decoder.stats.forwards
    assert forwards[1] <= forwards[0] * (0.5 if attention == "block_causal" else 0.56)


def test_demo(capsys):
    assert run_diffusion_demo(max_new_tokens=16, live=False)
    assert "identical" in capsys.readouterr().out
    assert run_diffusion_demo(max_new_tokens=16, live=True)
    with pytest.raises(FileNotFoundError, match="no masked-diffusion model in /no/such"):
        run_diffusion_demo("/no/such")
