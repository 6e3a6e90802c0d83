"""A ``generate`` call as decoders get it, and what makes an object a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..attention import check_supported
from ..target import Processor
from .request import callers_streamer, check_request, limits, prompt_starts, refuse_dict, row_processors


class Call:
    """What ``generate`` hands to a ``custom_generate`` callable.

    Attributes:
        decoder: name of the decoder, for messages.
        model, input_ids: of the call; ids i64[B, n], left-padded.
        config: the call's, or the model's.
        processors, stopping: as handed over; None if a decoder is called by itself.
        streamer: of the call.
        model_kwargs: all else.
    """

    def __init__(
        self,
        decoder: str,
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: LogitsProcessorList | None,
        stopping: StoppingCriteriaList | None,
        config: GenerationConfig | None,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.decoder, self.model, self.input_ids = decoder, model, input_ids.cpu()  # texts are the host's
        self.config = config or model.generation_config
        self.processors, self.stopping, self.model_kwargs = processors, stopping, model_kwargs
        self.streamer = streamer if streamer is not None else callers_streamer()

    def check(self, causal: bool = True, returns_dict: bool = False, on_cuda: bool = False) -> None:
        """Refuses what no decoder of texts can do.

        Args:
            causal: the model must be one that :func:`branchwise.attention.check_supported` lets pass.
            returns_dict: ``return_dict_in_generate`` is supported.
            on_cuda: the model may be on a GPU.

        Raises:
            ValueError: an unsupported model or request; the message says why.
        """
        if causal:
            check_supported(self.model, on_cuda)
        check_request(self.decoder, self.config, self.model_kwargs)
        if not returns_dict:
            refuse_dict(self.decoder, self.config)

    @cached_property
    def starts(self) -> list[int]:
        """Index of the first real token of every row."""
        return prompt_starts(self.input_ids, self.model_kwargs.get("attention_mask"))

    @cached_property
    def prompts(self) -> list[Tensor]:
        """i64[n_b] without padding."""
        return [self.input_ids[b, start:] for b, start in enumerate(self.starts)]

    def row_processors(self, rows: int | None = None) -> list[Sequence[Processor]]:
        """The processors of each row; ``rows``: as of a batch of so many."""
        return row_processors(self.processors, self.input_ids.shape[0] if rows is None else rows)

    def limits(self) -> tuple[int, StoppingCriteriaList, int]:
        """Longest text, padding included; criteria; padding token."""
        return limits(self.config, self.stopping, self.input_ids.shape[1])


class Decoder(ABC):
    """A ``custom_generate`` callable."""

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
        return self.decode(
            Call(
                type(self).__name__,
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
                model_kwargs,
            )
        )

    @abstractmethod
    def decode(self, call: Call) -> Any:
        """What ``generate`` returns: i64[B, n], or a dictionary."""
