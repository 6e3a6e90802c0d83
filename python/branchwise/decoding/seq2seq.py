"""BigLittle for encoder-decoders: the same cascade over transformers' own forwards and caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..acceptance import Rule
from ..cache import CACHE_NAME
from ..target import Processor, Target
from ..tree import RowTree, TokenTree
from .monitor import Monitor
from .request import Ending
from .stats import DecodeStats


class CachedDecoder:
    """The decoder of an encoder-decoder for one row, with the KV of some of its tokens.

    Args:
        model: the encoder-decoder.
        encoded: [1, S, H] of the encoder.
        mask: i64[1, S].
    """

    def __init__(self, model: PreTrainedModel, encoded: Tensor, mask: Tensor) -> None:
        self._model, self._mask = model, mask
        self._encoded = BaseModelOutput(last_hidden_state=encoded)
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.held = 0  # tokens whose KV is there
        self.forwards = 0

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Logits [n, V] after each of the next n tokens."""
        out = self._model(
            decoder_input_ids=torch.tensor([list(tokens)]),
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            use_cache=True,
            **{CACHE_NAME: self._cache},
        )
        self.held += len(tokens)
        self.forwards += 1
        return out.logits[0]

    def forget(self, length: int) -> None:
        """Keeps the first ``length`` tokens."""
        if length < self.held:
            self._cache.self_attention_cache.crop(length - self.held)  # negative: so many fewer
            self.held = length


def write_row(
    big: CachedDecoder,
    little: CachedDecoder,
    start: Tensor,
    *,
    fallback: float,
    little_tokens: int,
    rule: Rule,
    processors: Sequence[Processor],
    stopping: StoppingCriteriaList,
    longest: int,
    eos: frozenset[int],
    stats: DecodeStats,
    streamer: Any = None,
    monitor: Monitor | None = None,
) -> Tensor:
    """One text i64[n] by the two phases of card bild, from the decoder's ``start`` tokens i64[m] on."""
    text = torch.nn.functional.pad(start[None], (0, longest + little_tokens + 1 - len(start)))
    length, flags = len(start), []
    ending, ended = Ending(stopping, longest), False
    while not ended and not (monitor is not None and monitor.cancelled):
        draft = _draft(little, text[0, :length].tolist(), min(little_tokens, longest - length - 1), fallback, eos)
        tree = TokenTree(
            [RowTree.chain(int(text[0, length - 1]), draft, np.ones(len(draft)))],
            torch.tensor([length - 1], dtype=torch.int32),
        )
        logits = big.read(text[0, big.held : length].tolist() + draft)[-1 - len(draft) :]
        target = Target(logits[None], [text], [length], [processors])
        accepted = rule(tree, target, torch.zeros(1, len(draft) + 1, 2))
        said = accepted.tokens(tree, 0)
        drafted = len(said) - 1
        for i, token in enumerate(said):
            text[0, length] = token
            length += 1
            flags.append(i < drafted)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if ending(text, length, token):
                ended = True
                break
        stats.drafted += len(draft)
        if monitor is not None:
            monitor.advance(i + 1)
        # All but the last token, which nobody has read, and nothing that was taken back.
        for model in (big, little):
            model.forget(length - 1)
    stats.accepted += sum(flags)
    stats.emitted += len(flags)
    stats.forwards += big.forwards
    stats.row_forwards += big.forwards
    stats.accepted_flags.append(flags)
    return text[0, :length]


def _draft(little: CachedDecoder, text: list[int], most: int, fallback: float, eos: frozenset[int]) -> list[int]:
    """What the little model writes while it is sure, but for an end."""
    draft: list[int] = []
    while len(draft) < most:
        p, token = little.read((text + draft)[little.held :])[-1].float().softmax(-1).max(-1)
        if float(p) < fallback or int(token) in eos:
            break
        draft.append(int(token))
    return draft
