"""What ``generate`` hands to a custom decoder, checked and split into rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..cache import CACHE_NAME
from ..target import Processor

# Arguments that plain decoding passes to the model and that a tree decoder supplies itself.
_OWN_ARGUMENTS = {"attention_mask", "position_ids", CACHE_NAME, "logits_to_keep", "use_cache", "cache_position"}
_PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Ending:
    """Whether a row's text has ended, by its criteria or its length. Transformers' own two criteria are looked at
    without a tensor: they are asked for every token."""

    def __init__(self, criteria: StoppingCriteriaList, longest: int = sys.maxsize) -> None:
        self._tokens: set[int] = set()
        self._length = longest
        self._others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._tokens.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria:
                self._length = min(self._length, criterion.max_length)
            else:
                self._others.append(criterion)

    def __call__(self, text: Tensor, length: int | None = None, token: int | None = None) -> bool:
        """``text``: i64[1, n], the first ``length`` tokens of it (default: all), the last of which is ``token``."""
        length = text.shape[1] if length is None else length
        if length >= self._length or (int(text[0, length - 1]) if token is None else token) in self._tokens:
            return True
        return bool(self._others and self._others(text[:, :length], None).all())


def check_mode(decoder: str, config: GenerationConfig) -> None:
    """Raises ValueError for beams and other generation modes."""
    mode = config.get_generation_mode()
    if mode not in _PLAIN_MODES:
        raise ValueError(f"{decoder} decodes greedily or by sampling; this configuration asks for {mode.value}")


def check_request(decoder: str, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuses what a tree decoder cannot do.

    Raises:
        ValueError: beams or another generation mode, attentions or hidden states in the result, a cache that already
            holds tokens, or model inputs other than text.
    """
    check_mode(decoder, config)
    for option in ("output_attentions", "output_hidden_states"):
        if getattr(config, option) and config.return_dict_in_generate:
            raise ValueError(f"{option}=True is not supported by {decoder}")
    cache = model_kwargs.get(CACHE_NAME)
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(f"{CACHE_NAME} must be empty: {decoder} keeps a KV store of its own")
    other = sorted(key for key, value in model_kwargs.items() if key not in _OWN_ARGUMENTS and value is not None)
    if other:
        raise ValueError(f"{decoder} takes token ids only; it cannot pass {', '.join(other)} to the model")


def prompt_starts(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Index of the first real token of every left-padded row.

    Raises:
        ValueError: the mask has another shape, an empty row, or zeros after its first one (right padding, gaps).
    """
    B, length = input_ids.shape
    if length == 0:
        raise ValueError("input_ids must hold at least one token per row, got 0")
    if attention_mask is None:
        return [0] * B
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must have shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}")
    starts = []
    for row, mask in enumerate(attention_mask.bool()):
        start = length - int(mask.sum())
        if start == length or not mask[start:].all():
            raise ValueError(f"attention_mask[{row}] must be zeros, then ones (left padding), with at least one 1")
        starts.append(start)
    return starts


def row_processors(processors: LogitsProcessorList | None, batch_size: int) -> list[Sequence[Processor]]:
    """The processors of each row, which are called with that row alone.

    Raises:
        ValueError: a processor that runs the model itself, or one that is bound to the batch when there are more rows.
    """
    processors = processors or LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise ValueError("guidance_scale is not supported: its processor runs the model with a cache of its own")
        bound = (
            EncoderNoRepeatNGramLogitsProcessor,
            EncoderRepetitionPenaltyLogitsProcessor,
            SynthIDTextWatermarkLogitsProcessor,
        )
        if batch_size > 1 and isinstance(processor, bound):
            raise ValueError(
                f"{type(processor).__name__} keeps state per batch position; with it, decode one row at a time"
            )
    return [[_for_row(processor, row) for processor in processors] for row in range(batch_size)]


def _for_row(processor: Any, row: int) -> Processor:
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn  # expects the row's place in the batch
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor) and ignored.dim() > 0:  # the padding of every row, which penalties skip
        processor = copy(processor)
        processor.prompt_ignore_length = ignored[row : row + 1]
    return processor


def refuse_dict(decoder: str, config: GenerationConfig) -> None:
    """Of decoders that return texts alone.

    Raises:
        ValueError: ``return_dict_in_generate``.
    """
    if config.return_dict_in_generate:
        raise ValueError(f"return_dict_in_generate=True is not supported by {decoder}; it leaves its counts in stats")


def limits(
    config: GenerationConfig, stopping: StoppingCriteriaList | None, prompt_length: int
) -> tuple[int, StoppingCriteriaList, int]:
    """Longest text, criteria and padding token, prepared by ``generate`` or, if a decoder is called by itself, here.

    Raises:
        ValueError: no room for new tokens.
    """
    eos = getattr(config, "_eos_token_tensor", None)  # set by generate
    if stopping is None:
        ids = config.eos_token_id if eos is None else eos.flatten().tolist()
        stopping = StoppingCriteriaList([] if ids is None else [EosTokenCriteria(ids)])
        longest = prompt_length + config.max_new_tokens if config.max_new_tokens else config.max_length
    else:
        longest = stopping.max_length or config.max_length
    if longest is None or longest <= prompt_length:
        raise ValueError(f"max_length = {longest} leaves no room for new tokens behind {prompt_length}")
    pad = getattr(config, "_pad_token_tensor", None)
    return int(longest), stopping, int(config.pad_token_id or 0) if pad is None else int(pad.flatten()[0])


def callers_streamer() -> Any:
    """The ``streamer`` of the ``generate`` call that is running this decoder.

    transformers (5.17 to 5.23 read) feeds the prompt to the streamer but does not hand it to a callable
    ``custom_generate``, which would leave the user with a silent stream; so it is taken from the calling frame.
    """
    return callers("streamer")


def callers(name: str) -> Any:
    """A local variable of the ``generate`` call that is running this decoder; None if there is none."""
    frame = sys._getframe(1)
    for _ in range(8):  # wrappers such as no_grad lie between
        if frame.f_code.co_name == "generate" and "custom_generate" in frame.f_locals:
            return frame.f_locals.get(name)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def pad_and_stack(rows: Sequence[Tensor], pad: int) -> Tensor:
    """[B, longest] from rows of different lengths."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
