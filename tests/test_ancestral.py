"""Ancestral sampling against the closed form of the reverse process, and its guidance."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from branchwise.diffusion import AncestralSampling, RewardGuidedSampling
from branchwise.diffusion.ancestral import visible
from branchwise.noise import Noise
from test_diffusion import MASK, Streamer, decode, model, prompts

PROMPT = torch.tensor([[5, 6, 7]])


def constant_model(p):
    """LLaDA-style remote code whose every mask has the token probabilities ``p`` (f64[V], 0 for the mask)."""
    logits = p.log().float()

    class LLaDAConstant(tf.PreTrainedModel):
        config_class = tf.PretrainedConfig
        calls = 0

        def __init__(self):
            config = tf.PretrainedConfig(mask_token_id=MASK, vocab_size=len(p), is_encoder_decoder=False)
            config.model_type = "llada"
            super().__init__(config)
            self.anchor = torch.nn.Parameter(torch.zeros(1))  # says where the model is

        def forward(self, input_ids):
            LLaDAConstant.calls += 1
            return SimpleNamespace(logits=logits.expand(*input_ids.shape, -1))

    return LLaDAConstant().eval()


def sample(m, sampler, new, rows=1, **options):
    config = tf.GenerationConfig(max_length=3 + new, do_sample=True, temperature=1.0, pad_token_id=0, **options)
    return sampler(m, PROMPT.expand(rows, -1), generation_config=config)


def test_a_step_is_the_posterior():
    """One of four steps from all masks: the share that stays, and the tokens of what does not (chi-square)."""
    p = torch.tensor([0.0, 0.0, 0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    n, steps = 40 * 1000, 4

    class FirstStep(AncestralSampling):
        def _step(self, chain, step, share):
            if step == 0:
                super()._step(chain, step, share)

    out = sample(constant_model(p), FirstStep(steps, "none", seed=3), 1000, rows=40)[:, 3:].flatten()
    then = visible(1 - (1 - 1e-5) / steps)
    stays = (1 - then) / (1 - visible(1.0))
    expected = (1 - stays) * p
    expected[MASK] = stays
    seen = torch.bincount(out, minlength=6).double()
    here = expected > 0
    assert not seen[~here].any()
    assert float(((seen - n * expected)[here] ** 2 / (n * expected[here])).sum()) < 23.5  # 4 degrees, 1e-4


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_the_chain_ends_in_the_models_distribution(steps):
    p = torch.tensor([0.1, 0.0, 0.5, 0.2, 0.15, 0.05], dtype=torch.float64)
    n = 30 * 1000
    out = sample(constant_model(p), AncestralSampling(steps, seed=steps), 1000, rows=30)[:, 3:].flatten()
    seen = torch.bincount(out, minlength=6).double()
    assert seen[MASK] == 0
    here = p > 0
    assert float(((seen - n * p)[here] ** 2 / (n * p[here])).sum()) < 23.5
    # Neighbours are independent: the product law of pairs.
    pairs = torch.bincount(out[0::2] * 6 + out[1::2], minlength=36).double()
    expected = (n / 2) * torch.outer(p, p).flatten()
    here = expected > 0
    assert float(((pairs - expected)[here] ** 2 / expected[here]).sum()) < 56  # 24 degrees, 2e-4


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_batches_seeds_and_prompts(attention):
    m, (ids, mask) = model(attention), prompts()
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    texts = {seed: decode(m, AncestralSampling(6, seed=seed), ids, mask, **options) for seed in (1, 2)}
    assert not torch.equal(texts[1], texts[2])
    assert torch.equal(texts[1], decode(m, AncestralSampling(6, seed=1), ids, mask, **options))
    assert torch.equal(texts[1][:, : ids.shape[1]], ids) and not (texts[1][:, ids.shape[1] :] == MASK).any()
    own = mask[1].bool()
    alone = decode(m, AncestralSampling(6, seed=1), ids[1:2, own], None, **options)
    assert torch.equal(alone[0, -19:], texts[1][1, -19:])


def test_removals_and_forwards():
    p = torch.tensor([0.0, 0.0, 0.6, 0.4], dtype=torch.float64)
    m = constant_model(p)
    for removal in ("ancestral", "greedy", "none"):
        sampler = AncestralSampling(2, removal, seed=0)
        sampler._step = lambda *args: None  # nothing is ever unmasked
        out = sample(m, sampler, 50)[0, 3:]
        assert sampler.stats.forwards == 1, "nothing changed, so one forward serves all steps"
        kinds = set(out.tolist())
        assert kinds == {"ancestral": {2, 3}, "greedy": {2}, "none": {MASK}}[removal]


def test_text_ends_at_an_end_token():
    p = torch.tensor([0.0, 0.0, 0.9, 0.1], dtype=torch.float64)
    config = tf.GenerationConfig(max_new_tokens=60, do_sample=True, pad_token_id=0, eos_token_id=[3, 9])
    out = AncestralSampling(4, seed=1)(constant_model(p), PROMPT, generation_config=config)[0]
    assert out[-1] == 3 and (out[3:-1] == 2).all()


def test_the_text_is_streamed_in_the_end():
    m, streamer = model("full"), Streamer()
    out = decode(m, AncestralSampling(5, seed=2), prompts(1)[0], None, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended
    with pytest.raises(ValueError, match="return_dict_in_generate=True is not supported by AncestralSampling"):
        decode(m, AncestralSampling(5), prompts(1)[0], None, return_dict_in_generate=True)


# Guidance


def prefer(token, weight=1.0):
    return lambda soft: weight * soft[..., token]


def test_no_guidance_is_plain_sampling():
    m, (ids, mask) = model("full"), prompts()
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    plain = decode(m, AncestralSampling(7, seed=4), ids, mask, **options)
    guided = RewardGuidedSampling(prefer(9), 7, scale=(0.0, 0.0), candidates=1, seed=4)
    assert torch.equal(decode(m, guided, ids, mask, **options), plain)


def test_larger_scales_and_more_candidates_raise_the_reward():
    p = torch.full((12,), 1 / 10, dtype=torch.float64)
    p[[0, MASK]] = 0
    m, n = constant_model(p), 600
    share = {}
    for h in (0.0, 5.0, 100.0):
        out = sample(m, RewardGuidedSampling(prefer(7), 8, (h, h), 1, rerank=0.0, seed=1), n)
        share[h] = float((out[0, 3:] == 7).double().mean())
    # d softmax / d log p is at most p (1 - p): h = 5 moves a logit by 0.45
    assert abs(share[0.0] - 0.1) < 0.05 and share[0.0] < share[5.0] < share[100.0]
    for candidates in (1, 8):
        out = sample(m, RewardGuidedSampling(prefer(7, 5.0), 8, (0, 0), candidates, rerank=1.0, seed=1), 40, rows=20)
        share[candidates] = float((out[:, 3:] == 7).double().mean())
    assert share[8] > share[1] + 0.05


def test_inside_inference_mode():
    """Whose tensors take no part in gradients."""
    m, (ids, mask) = model("full"), prompts()
    outs = []
    for mode in (False, True):
        guided = RewardGuidedSampling(lambda soft: (soft * soft).sum(-1), 5, (3.0, 9.0), 2, seed=4)
        with torch.inference_mode(mode):
            outs.append(decode(m, guided, ids, mask))
    assert torch.equal(*outs)


def test_the_pick_is_a_draw_not_the_best():
    """Two candidates whose rewards differ by log 3 are picked three to one; equal ones evenly."""
    sampler = RewardGuidedSampling(None, 4, candidates=2)
    for gap, share in ((math.log(3), 0.75), (0.0, 0.5)):
        sampler.reward = lambda soft, gap=gap: gap * soft[..., 5]
        picks = [sampler._pick(*fake_candidates(seed), step=1) for seed in range(4000)]
        better = sum(pick == 1 for pick in picks) / len(picks)
        assert abs(better - share) < 5 * math.sqrt(share * (1 - share) / 4000)


def fake_candidates(seed):
    chain = SimpleNamespace(
        texts=[torch.tensor([3, MASK])],
        logits=[torch.zeros(1, 8)],
        noise=Noise([seed], [torch.tensor([3]).numpy()]),
    )
    return chain, 0, [(torch.tensor([1]), torch.tensor([token])) for token in (4, 5)]


def test_the_tilt_is_the_cut_gradient():
    """Against finite differences on random logits and a reward that is no linear function."""

    chain = SimpleNamespace(
        texts=[torch.tensor([3, MASK, 4, MASK])],
        logits=[torch.randn(2, 6, generator=torch.Generator().manual_seed(0)) * 2],
        spec=SimpleNamespace(never_said=[MASK]),
        masks=lambda row: torch.tensor([1, 3]),
    )
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

    def reward(soft):
        return (soft * weights).sum(-1) ** 2

    sampler = RewardGuidedSampling(reward, 4)
    log_probs = chain.logits[0].index_fill(1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
    for h in (0.1, 30.0):
        moved = sampler._tilted(chain, 0, h)
        for i, j in ((0, 0), (0, 3), (1, 5), (1, 2)):
            ends = []
            for step in (1e-3, -1e-3):
                shifted = log_probs.clone()
                shifted[i, j] += step
                soft = torch.nn.functional.one_hot(chain.texts[0], 6).float()
                soft[[1, 3]] = shifted.softmax(-1)
                ends.append(float(reward(soft[None])[0, [1, 3]].sum()))
            slope = max(-1.0, min(1.0, (ends[0] - ends[1]) / 2e-3))
            assert abs(float(moved[i, j] - log_probs[i, j]) - h * slope) < 2e-2 * h
        assert (moved[:, MASK] == -torch.inf).all()


def test_refuses():
    for message, make in {
        "steps must be at least 1, got 0": lambda: AncestralSampling(0),
        "removal must be one of ancestral, greedy, none, got 'x'": lambda: AncestralSampling(3, "x"),
        "candidates must lie between 1 and 256, got 0": lambda: RewardGuidedSampling(prefer(1), candidates=0),
        "rerank must lie between 0 and 1, got 2": lambda: RewardGuidedSampling(prefer(1), rerank=2),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    m, (ids, mask) = model("full"), prompts()
    with pytest.raises(ValueError, match="samples the model's softmax as it is; it cannot use TopK"):
        decode(m, AncestralSampling(3), ids, mask, do_sample=True, top_k=5)
