"""The plain sampler whose tokens sample-and-match reproduces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .. import ops
from ..noise import Noise, Seed, row_seeds
from .request import callers_streamer, prompt_starts


class PositionKeyedSampler:
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

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        config = generation_config or model.generation_config
        if not config.do_sample:
            raise ValueError("PositionKeyedSampler samples: pass do_sample=True")
        starts = prompt_starts(input_ids, model_kwargs.get("attention_mask"))
        prompts = [input_ids[b, start:].numpy() for b, start in enumerate(starts)]
        draw = _KeyedDraw(Noise(row_seeds(self.seed, len(prompts)), prompts), torch.tensor(starts))
        return model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([*(logits_processor or []), draw]),
            stopping_criteria=stopping_criteria or StoppingCriteriaList(),
            generation_config=config,
            streamer=streamer if streamer is not None else callers_streamer(),
            **model_kwargs,
        )


class _KeyedDraw(LogitsProcessor):
    """Leaves one token per row, drawn as :data:`branchwise.acceptance.SAMPLE_AND_MATCH` does."""

    def __init__(self, noise: Noise, starts: Tensor) -> None:
        self._noise, self._starts = noise, starts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        B, length = input_ids.shape
        no_link = torch.full((B, 1), -1, dtype=torch.int32)
        uniforms = self._noise.at_positions((length - self._starts)[:, None])
        _, _, token = ops.verify_sample(input_ids[:, -1:].contiguous(), no_link, no_link, scores[:, None], uniforms)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
