"""A row's text while it is being unmasked: what is known, what was predicted, which part is looked at next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .rules import StepRule
from .spec import DiffusionSpec
from .window import Kind, Window

CACHES = ("block", "none", "prefix", "dual")


@dataclass(frozen=True)
class Layout:
    """How a run cuts its texts.

    Attributes:
        cache: "block": keys of finished blocks are kept (block-causal models); "none": every forward sees the whole
            text; "prefix" and "dual": keys of what lies before the block, or before and behind it, are kept from a
            forward of the whole text at the block's start (full attention; approximations, Fast-dLLM).
        block: tokens that are unmasked together.
        ahead: blocks behind the current one that drafts may reach.
        draft_length: most states that a forward verifies.
    """

    spec: DiffusionSpec
    rule: StepRule
    cache: str
    block: int
    ahead: int
    draft_length: int


class Canvas:
    """One row.

    Args:
        prompt: i64[P].
        length: tokens of the text in the end; a block-causal canvas goes on to the end of the block.
    """

    def __init__(self, layout: Layout, prompt: Tensor, length: int) -> None:
        self.layout, self.prompt, self.length = layout, len(prompt), length
        block, spec = layout.block, layout.spec
        blocks_from_start = spec.attention == "block_causal"
        self.size = -(-length // block) * block if blocks_from_start else length
        self.origin = 0 if blocks_from_start else self.prompt
        self.tokens = torch.full((self.size,), spec.mask_id)
        self.tokens[: self.prompt] = prompt
        self.predicted = torch.zeros(self.size, dtype=torch.int64)
        self.scores = torch.full((self.size,), -torch.inf)
        self.steps: list[int] = []  # tokens that each step fixes, by a rule that counts
        for begin in range(self.origin, self.size, block):
            masks = int((self.tokens[begin : begin + block] == spec.mask_id).sum())
            self.steps += layout.rule.counts(masks)
        self.taken = 0  # steps
        self.held = 0  # tokens whose keys are kept for good: of a block-causal text
        self.kept: list[int] = []  # positions whose keys the store holds, of "prefix" and "dual"
        self._stale = True  # "prefix", "dual": a block begins
        self._drafts, self._num = torch.empty(0), torch.empty(0)
        self.known = self.prompt  # tokens before the first mask

    @property
    def finished(self) -> bool:
        return self.known >= self.length

    def _current(self) -> int:
        """Where the block of the first mask begins."""
        first = int((self.tokens == self.layout.spec.mask_id).int().argmax())
        offset = (first - self.origin) // self.layout.block
        return self.origin + offset * self.layout.block

    def _limit(self, current: int) -> int:
        """Where drafts end."""
        return min(current + (1 + self.layout.ahead) * self.layout.block, self.size)

    def _end(self, current: int) -> int:
        """Behind the last token that this round of forwards is about: of the text, or of a block that begins anew."""
        return self.size if self.layout.cache in ("none", "block") else min(current + self.layout.block, self.size)

    def _done(self, state: Tensor, stop: int) -> bool:
        """No mask before ``stop``, and the window reaches as far."""
        return len(state) >= stop and not bool((state[:stop] == self.layout.spec.mask_id).any())

    def _span(self, current: int) -> tuple[int, int]:
        """The stretch that forwards see anew."""
        cache, block = self.layout.cache, self.layout.block
        if cache == "none":
            return 0, self.size
        # Where logits are about the next token, the one before the block belongs to it.
        start = current - self.layout.spec.shift
        if cache == "block":
            return self.held, self._limit(current)
        return start, self.size if cache == "prefix" else min(current + block, self.size)

    def window(self) -> Window:
        layout, spec = self.layout, self.layout.spec
        current = self._current()
        limit = self._limit(current)
        if layout.cache in ("prefix", "dual") and self._stale:
            self._start, end = 0, self.size
            kind, states = Kind.REFRESH, self.tokens[None]
        else:
            self._start, end = self._span(current)
            here = slice(self._start, end)
            scores = self.scores[here].clone()
            scores[max(limit - self._start, 0) :] = -torch.inf
            self._counts = self._next_counts(layout.draft_length)
            drafts, num = ops.draft_blocks(
                self.tokens[None, here].contiguous(),
                self.predicted[None, here].contiguous(),
                scores[None],
                self._origin(),
                self._counts,
                spec.mask_id,
                layout.block,
                layout.rule.rule,
                layout.rule.level,
            )
            # Where everything is known, nothing is left to ask.
            stop = self._end(current) - self._start
            while int(num) > 1 and self._done(drafts[0, int(num) - 1], stop):
                num -= 1
            kind = Kind.VERIFY if int(num) else Kind.LOOK
            states = drafts[0, : int(num)] if int(num) else self.tokens[None, here]
            self._drafts, self._num = drafts[:, : max(int(num), 1)], num
        held = 0 if kind is Kind.REFRESH else self.held or len(self.kept)
        return Window.of(kind, states, self._start, spec.block_size, spec.mask_id, current, limit, held)

    def take(self, window: Window, found: Tensor, sure: Tensor) -> list[int]:
        """Learns the predictions of the window's nodes, i64[n] and f32[n], and goes as far as they prove.

        Returns:
            The nodes whose keys the store is to keep.
        """
        layout, W = self.layout, window.states.shape[1]
        there = window.nodes >= 0
        tokens = found[window.nodes.clamp(min=0)]
        scores = torch.where(there, sure[window.nodes.clamp(min=0)], -torch.inf)
        here = slice(window.start, window.start + W)
        best, keep = 0, []
        if window.kind is Kind.VERIFY:
            best = int(self._verify(tokens, scores))
            self.tokens[here] = window.states[best]
            self.taken += best + 1
        self._learn(here, tokens, scores, there, best)
        if window.kind is Kind.REFRESH:
            self._stale = False
            start, end = self._span(self._current())
            self.kept = keep = [*range(start), *range(end, self.size)]
        elif layout.cache == "block":
            clean = (self.tokens[here] != layout.spec.mask_id).view(-1, layout.block).all(1)
            done = int(clean.int().cumprod(0).sum()) * layout.block
            keep = window.nodes[best, :done].tolist()
            self.held += len(keep)
        self._finish_block()
        return keep

    def _learn(self, here: slice, tokens: Tensor, scores: Tensor, there: Tensor, best: int) -> None:
        """Predictions at the state that was reached; where it has no nodes, the latest guess of another state, which is
        good enough for drafts that lie behind the first step."""
        for i in (*range(best + 1, len(there)), best):
            new = there[i] & ((scores[i] > -torch.inf) | (i == best))
            self.predicted[here] = torch.where(new, tokens[i], self.predicted[here])
            self.scores[here] = torch.where(new, scores[i], self.scores[here])

    def _finish_block(self) -> None:
        """Takes the next step, which is proven, where nothing has to be seen after it."""
        layout, mask_id = self.layout, self.layout.spec.mask_id
        masked = self.tokens == mask_id
        if bool(masked.any()):
            end = self._end(self._current())
            after, num = ops.draft_blocks(
                self.tokens[None],
                self.predicted[None],
                self.scores[None],
                torch.tensor([self.origin], dtype=torch.int32),
                self._next_counts(1),
                mask_id,
                layout.block,
                layout.rule.rule,
                layout.rule.level,
            )
            if int(num) and not bool((after[0, 0, :end] == mask_id).any()):
                self.tokens = after[0, 0]
                self.taken += 1
                self._stale = True
        masked = self.tokens == mask_id
        self.known = int(masked.int().argmax()) if bool(masked.any()) else self.size

    def _verify(self, tokens: Tensor, scores: Tensor) -> Tensor:
        layout = self.layout
        return ops.verify_blocks(
            self._drafts.contiguous(),
            self._num,
            tokens[None].contiguous(),
            scores[None].contiguous(),
            self._origin(),
            self._counts[:, : self._drafts.shape[1] + 1].contiguous(),
            layout.spec.mask_id,
            layout.block,
            layout.rule.rule,
            layout.rule.level,
        )

    def _origin(self) -> Tensor:
        return torch.tensor([self.origin - self._start], dtype=torch.int32)

    def _next_counts(self, drafts: int) -> Tensor:
        counts = self.steps[self.taken : self.taken + drafts + 1]
        return torch.tensor([counts + [1] * (drafts + 1 - len(counts))], dtype=torch.int32)
