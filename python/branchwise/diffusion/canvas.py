"""A row's text while it is being unmasked: what is known, what was predicted, which part is looked at next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .guesses import TOKENS, Chances, Guess, Guesser
from .rules import StepRule
from .spec import DiffusionSpec
from .window import Kind, Predictions, Window

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
        table: what is known of guesses, for states that form a tree; None: one chain of states.
        least_chance: of a state of a tree that is worth its place.
    """

    spec: DiffusionSpec
    rule: StepRule
    cache: str
    block: int
    ahead: int
    draft_length: int
    table: Chances | None = None
    least_chance: float = 0.0

    @property
    def guesses(self) -> bool:
        """Whether states form a tree: where every step unmasks one token."""
        return self.table is not None and self.rule.rule == "count" and set(self.rule.counts(self.block)) <= {1}


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
        self.choices = torch.zeros(self.size, TOKENS, dtype=torch.int64)  # likeliest tokens of every mask
        self.chances = torch.zeros(self.size, TOKENS)
        self._guessed: tuple[Guesser, list[Guess]] | None = None  # in the last forward that verified guesses
        self._offset = self._accepted = 0  # its window's start, and the guess that it has proven
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
            self._counts = self._next_counts(1 if layout.guesses else layout.draft_length)
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
            if layout.guesses and int(num):
                drafts, num = self._guess(drafts, scores)
            # Where everything is known, nothing is left to ask.
            stop = self._end(current) - self._start
            while int(num) > 1 and self._done(drafts[0, int(num) - 1], stop):
                num -= 1
            kind = Kind.VERIFY if int(num) else Kind.LOOK
            states = drafts[0, : int(num)] if int(num) else self.tokens[None, here]
            self._drafts, self._num = drafts[:, : max(int(num), 1)], num
        held = 0 if kind is Kind.REFRESH else self.held or len(self.kept)
        # A step that unmasks one token needs the next block's predictions when the last is nearly done.
        ahead_below = 3 if layout.guesses else layout.block
        return Window.of(kind, states, self._start, spec.block_size, spec.mask_id, current, limit, held, ahead_below)

    def _guess(self, first: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """States i64[1, k, W] behind the certain first one, and k; also learns from how the last guesses fared."""
        layout, mask_id, table = self.layout, self.layout.spec.mask_id, self.layout.table
        assert table is not None
        W = first.shape[2]
        here = slice(self._start, self._start + W)
        at = int((first[0, 0] != self.tokens[here]).int().argmax())
        if self._guessed is not None:
            self._observe(at + self._start, int(first[0, 0, at]), table)
        blocks = [(i + self._start - self.origin) // layout.block for i in range(W)]
        masked = torch.nonzero(first[0, 0] == mask_id).flatten().tolist()
        choices = self.choices[here].tolist()
        guesser = Guesser(masked, blocks, scores.tolist(), choices, self.chances[here].tolist(), table)
        guesses = guesser.grow(layout.draft_length - 1, layout.least_chance)
        states = first.repeat(1, 1 + len(guesses), 1)
        for i, guess in enumerate(guesses, start=1):
            for position, token in guess.added.items():
                states[0, i, position] = token
        stop = self._end(self._current()) - self._start
        open_ = [0] + [i for i in range(1, len(guesses) + 1) if not self._done(states[0, i], stop)]
        self._guessed = (guesser, [Guess({}, []), *(guesses[i - 1] for i in open_[1:])])
        self._offset = self._start
        self._counts = torch.ones(1, len(open_) + 1, dtype=torch.int32)
        return states[:, open_].contiguous(), torch.tensor([len(open_)], dtype=torch.int32)

    def _observe(self, position: int, token: int, table: Chances) -> None:
        """The step after the last accepted guess, seen from the predictions that it was made of."""
        assert self._guessed is not None
        guesser, guesses = self._guessed
        accepted = guesses[self._accepted]
        for step in accepted.steps:
            table.observe(*step)
        guesser.observe(accepted, position - self._offset, token)

    def take(self, window: Window, found: Predictions) -> list[int]:
        """Learns the predictions of the window's nodes and goes as far as they prove.

        Returns:
            The nodes whose keys the store is to keep.
        """
        layout, W = self.layout, window.states.shape[1]
        there = window.nodes >= 0
        nodes = window.nodes.clamp(min=0)
        tokens, scores = found.tokens[nodes], torch.where(there, found.scores[nodes], -torch.inf)
        here = slice(window.start, window.start + W)
        best, keep = 0, []
        if window.kind is Kind.VERIFY:
            best = int(self._verify(tokens, scores))
            self.tokens[here] = window.states[best]
            self.taken += int((window.states[best] != window.states[0]).sum()) + 1 if layout.guesses else best + 1
            self._accepted = best
        self._learn(here, window.nodes, scores, found, best)
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

    def _learn(self, here: slice, nodes: Tensor, scores: Tensor, found: Predictions, best: int) -> None:
        """Predictions at the state that was reached; where it has no nodes, the latest guess of another state, which is
        good enough for drafts that lie behind the first step."""
        for i in (*range(best + 1, len(nodes)), best):
            new = torch.nonzero((nodes[i] >= 0) & ((scores[i] > -torch.inf) | (i == best))).flatten()
            at, node = new + here.start, nodes[i, new]
            self.predicted[at], self.scores[at] = found.tokens[node], scores[i, new]
            if found.choices is not None and found.chances is not None:
                self.choices[at], self.chances[at] = found.choices[node], found.chances[node]

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
