"""The plain sampler whose tokens sample-and-match reproduces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from .. import ops
from ..noise import Noise, Seed, row_seeds
from .call import Call, Decoder


class PositionKeyedSampler(Decoder):
    """A ``custom_generate`` callable: transformers' own sampling loop, one token per forward, with noise that is a
    function of the seed, the prompt and the position.

    ``TreeSpeculation(seed=s)`` with its default rule for retrieved drafts (sample-and-match) gives the very tokens of
    ``PositionKeyedSampler(seed=s)``: in fp32, up to draws that fall on a boundary within rounding. Scores in the
    result (``output_scores``) are 0 for the token drawn and -inf elsewhere.

    Args:
        seed: see :func:`branchwise.noise.row_seeds`.
    """

    def __init__(self, seed: Seed = None) -> None:
        self.seed = seed

    def decode(self, call: Call) -> Any:
        model, input_ids, config = call.model, call.input_ids, call.config
        if not config.do_sample:
            raise ValueError("PositionKeyedSampler samples: pass do_sample=True")
        noise = Noise(row_seeds(self.seed, len(call.prompts)), [prompt.numpy() for prompt in call.prompts])
        draw = _KeyedDraw(noise, torch.tensor(call.starts))
        return model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([*(call.processors or []), draw]),
            stopping_criteria=call.stopping or StoppingCriteriaList(),
            generation_config=config,
            streamer=call.streamer,
            **call.model_kwargs,
        )


class _KeyedDraw(LogitsProcessor):
    """Leaves one token per row, drawn as :data:`branchwise.acceptance.SAMPLE_AND_MATCH` does."""

    def __init__(self, noise: Noise, starts: Tensor) -> None:
        self._noise, self._starts = noise, starts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms = self._noise.at_positions((input_ids.shape[1] - self._starts)[:, None])
        tokens = draw_tokens(scores, uniforms)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def draw_tokens(scores: Tensor, uniforms: Tensor) -> Tensor:
    """i64[B] drawn from scores [B, V] with uniforms f32[B, 1, 2], as sample-and-match draws at a root."""
    B = len(scores)
    no_link = torch.full((B, 1), -1, dtype=torch.int32)
    return ops.verify_sample(torch.zeros(B, 1, dtype=torch.int64), no_link, no_link, scores[:, None], uniforms)[2]
