"""A row's text while it is being unmasked: what is known, what was predicted, which part is looked at next."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .chances import CHOICES, Chances
from .guesses import Guess, Guesser
from .layout import Layout
from .window import Kind, Predictions, Window


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
        # The same memory. Arrays as short as these cost their calls, and numpy's are the cheaper ones.
        self._ids = self.tokens.numpy()
        self._predicted = np.zeros(self.size, np.int64)
        self._scores = np.full(self.size, -np.inf, np.float32)
        self.steps: list[int] = []  # tokens that each step fixes, by a rule that counts
        for begin in range(self.origin, self.size, block):
            masks = int((self._ids[begin : begin + block] == spec.mask_id).sum())
            self.steps += layout.rule.counts(masks)
        self.taken = 0  # steps
        self.held = 0  # tokens whose keys are kept for good: of a block-causal text
        self.kept: list[int] = []  # positions whose keys the store holds, of "prefix" and "dual"
        self._choices = np.zeros((self.size, CHOICES), np.int64)  # likeliest tokens of every mask
        self._chances = np.zeros((self.size, CHOICES), np.float32)
        self._guessed: tuple[Guesser, list[Guess]] | None = None  # in the last forward that verified guesses
        self._offset = self._accepted = 0  # its window's start, and the guess that it has proven
        self._stale = True  # "prefix", "dual": a block begins
        self.known = self.prompt  # tokens before the first mask

    @property
    def finished(self) -> bool:
        return self.known >= self.length

    def _current(self) -> int:
        """Where the block of the first mask begins."""
        first = int((self._ids == self.layout.spec.mask_id).argmax())
        offset = (first - self.origin) // self.layout.block
        return self.origin + offset * self.layout.block

    def _limit(self, current: int) -> int:
        """Where drafts end."""
        return min(current + (1 + self.layout.ahead) * self.layout.block, self.size)

    def _end(self, current: int) -> int:
        """Behind the last token that this round of forwards is about: of the text, or of a block that begins anew."""
        return self.size if self.layout.cache in ("none", "block") else min(current + self.layout.block, self.size)

    def _done(self, state: np.ndarray, stop: int) -> bool:
        """No mask before ``stop``, and the window reaches as far."""
        return len(state) >= stop and not (state[:stop] == self.layout.spec.mask_id).any()

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
            kind, states = Kind.REFRESH, self._ids[None]
        else:
            self._start, end = self._span(current)
            here = slice(self._start, end)
            scores = self._scores[here].copy()
            scores[max(limit - self._start, 0) :] = -np.inf
            self._counts = self._next_counts(1 if layout.guesses else layout.draft_length)
            states = self._draft(here, scores, self._counts)
            if layout.guesses and len(states):
                states = self._guess(states, scores, current)
            elif layout.chain is not None and len(states) > 1:
                states = states[: self._paying(layout.chain.reached(len(states) - 1), current, states.shape[1])]
            # Where everything is known, nothing is left to ask.
            stop = self._end(current) - self._start
            while len(states) > 1 and self._done(states[-1], stop):
                states = states[:-1]
            kind = Kind.VERIFY if len(states) else Kind.LOOK
            states = states if len(states) else self._ids[None, here]
        held = 0 if kind is Kind.REFRESH else self.held or len(self.kept)
        # A step that unmasks one token needs the next block's predictions when the last is nearly done.
        ahead_below = 2 if layout.guesses else layout.block
        return Window.of(kind, states, self._start, spec.block_size, spec.mask_id, current, limit, held, ahead_below)

    def _paying(self, chances: list[float], current: int, width: int) -> int:
        """How many states are worth their tokens, given the chances of those behind the first."""
        layout = self.layout
        if layout.pace is None:
            return len(chances) + 1
        blocks = layout.spec.block_size > 0  # otherwise states share nothing
        return layout.pace.states(chances, current - self._start if blocks else 0, layout.block if blocks else width)

    def _guess(self, first: np.ndarray, scores: np.ndarray, current: int) -> np.ndarray:
        """States i64[k, W] from the certain first one on; also learns from how the last guesses fared."""
        layout, mask_id = self.layout, self.layout.spec.mask_id
        table, neighbours = layout.table, layout.neighbours
        assert table is not None and neighbours is not None
        W = first.shape[1]
        here = slice(self._start, self._start + W)
        at = int((first[0] != self._ids[here]).argmax())
        token = int(first[0, at])
        if self._guessed is not None:
            self._observe(at + self._start, token, table)
        blocks = [(i + self._start - self.origin) // layout.block for i in range(W)]
        masked = np.flatnonzero(first[0] == mask_id).tolist()
        choices = self._choices[here].tolist()
        chances, probable = self._chances[here].tolist(), layout.rule.score == "probability"
        guesser = Guesser(masked, blocks, scores.tolist(), choices, chances, table, neighbours, probable)
        certain = guesser.first(at, token)
        most = layout.draft_length if layout.pace is None else min(layout.draft_length, layout.pace.room)
        guesses = guesser.grow(certain, most - 1, layout.least_chance)
        paying = self._paying([guess.chance for guess in guesses], current, W)
        # Before those that they lead to, whichever way.
        guesses = sorted(guesses[: paying - 1], key=lambda guess: len(guess.added))
        states = first.repeat(1 + len(guesses), 0)
        for i, guess in enumerate(guesses, start=1):
            states[i, list(guess.added)] = list(guess.added.values())
        stop = self._end(current) - self._start
        open_ = [0] + [i for i in range(1, len(guesses) + 1) if not self._done(states[i], stop)]
        self._guessed = (guesser, [certain, *(guesses[i - 1] for i in open_[1:])])
        self._offset = self._start
        self._counts = torch.ones(1, len(open_) + 1, dtype=torch.int32)
        return states[open_]

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
        layout, nodes = self.layout, window.nodes.numpy()
        W = nodes.shape[1]
        here = slice(window.start, window.start + W)
        # Tokens without a node have the number -1: whatever lies there, with the score of nothing.
        tokens, scores = found.tokens[nodes], np.where(nodes >= 0, found.scores[nodes], -np.inf)
        best, keep = 0, []
        if window.kind is Kind.VERIFY:
            best = self._verify(window.states, tokens, scores)
            states = window.states.numpy()
            self._ids[here] = states[best]
            if layout.guesses:
                self.taken += int((states[best] != states[0]).sum()) + 1
            else:
                self.taken += best + 1
                if layout.chain is not None:
                    layout.chain.observe(len(states) - 1, best)
            self._accepted = best
        self._learn(window.start, nodes, scores, found, best)
        if layout.guesses:
            self._learn_neighbours(window, nodes, scores, found, best)
        if window.kind is Kind.REFRESH:
            self._stale = False
            start, end = self._span(self._current())
            self.kept = keep = [*range(start), *range(end, self.size)]
        elif layout.cache == "block":
            clean = (self._ids[here] != layout.spec.mask_id).reshape(-1, layout.block).all(1)
            done = int(np.logical_and.accumulate(clean).sum()) * layout.block
            keep = nodes[best, :done].tolist()
            self.held += len(keep)
        self._finish_block()
        return keep

    def _learn(self, start: int, nodes: np.ndarray, scores: np.ndarray, found: Predictions, best: int) -> None:
        """Predictions at the state that was reached; where it has no nodes, the latest guess of another state, which is
        good enough for drafts that lie behind the first step."""
        known = scores > -np.inf
        known[best] = nodes[best] >= 0
        known[:best] = False
        # The state that was reached first, then the others from the last on.
        order = [best, *range(len(nodes) - 1, best, -1)]
        at = np.flatnonzero(known.any(0))
        state = np.array(order)[known[order][:, at].argmax(0)]
        node, at = nodes[state, at], at + start
        self._predicted[at], self._scores[at] = found.tokens[node], scores[state, at - start]
        if found.choices is not None and found.chances is not None:
            self._choices[at], self._chances[at] = found.choices[node], found.chances[node]

    def _learn_neighbours(
        self, window: Window, nodes: np.ndarray, scores: np.ndarray, found: Predictions, best: int
    ) -> None:
        """What was said beside known tokens, in all states; in the one that was reached, last."""
        neighbours, mask_id = self.layout.neighbours, self.layout.spec.mask_id
        assert neighbours is not None and found.choices is not None and found.chances is not None
        order = [*(i for i in range(len(nodes)) if i != best), best]
        states, nodes, asked = window.states.numpy()[order], nodes[order], scores[order] > -np.inf
        choices, chances = found.choices.tolist(), found.chances.tolist()
        known = states != mask_id
        for side, beside, said in ((0, slice(0, -1), slice(1, None)), (1, slice(1, None), slice(0, -1))):
            at = known[:, beside] & asked[:, said]
            for token, node in zip(states[:, beside][at].tolist(), nodes[:, said][at].tolist(), strict=True):
                neighbours.observe(side, token, choices[node], chances[node])

    def _finish_block(self) -> None:
        """Takes the next step, which is proven, where nothing has to be seen after it."""
        layout, mask_id = self.layout, self.layout.spec.mask_id
        masked = np.flatnonzero(self._ids == mask_id)
        if len(masked):
            current = self._current()
            end = self._end(current)
            # A step stays in its block.
            if not ((masked >= current + layout.block) & (masked < end)).any():
                after = self._draft(slice(0, self.size), self._scores, self._next_counts(1))
                if len(after) and not (after[0, :end] == mask_id).any():
                    self._ids[:] = after[0]
                    self.taken += 1
                    self._stale = True
                    masked = np.flatnonzero(self._ids == mask_id)
        self.known = int(masked[0]) if len(masked) else self.size

    def _draft(self, here: slice, scores: np.ndarray, counts: Tensor) -> np.ndarray:
        """States i64[k, W] that the predictions of a stretch lead to, as many as there are counts for."""
        layout = self.layout
        drafts, num = ops.draft_blocks(
            self.tokens[None, here].contiguous(),
            torch.from_numpy(self._predicted[None, here]),
            torch.from_numpy(scores[None]),
            self._origin(here.start),
            counts,
            layout.spec.mask_id,
            layout.block,
            layout.rule.rule,
            layout.rule.level,
        )
        return drafts[0, : int(num)].numpy()

    def _verify(self, drafts: Tensor, tokens: np.ndarray, scores: np.ndarray) -> int:
        """The last of the drafts i64[k, W] that the predictions at them prove."""
        layout = self.layout
        accepted = ops.verify_blocks(
            drafts[None],
            torch.tensor([len(drafts)], dtype=torch.int32),
            torch.from_numpy(tokens[None]),
            torch.from_numpy(scores[None]),
            self._origin(self._start),
            self._counts[:, : len(drafts) + 1].contiguous(),
            layout.spec.mask_id,
            layout.block,
            layout.rule.rule,
            layout.rule.level,
        )
        return int(accepted)

    def _origin(self, start: int) -> Tensor:
        return torch.tensor([self.origin - start], dtype=torch.int32)

    def _next_counts(self, drafts: int) -> Tensor:
        counts = self.steps[self.taken : self.taken + drafts + 1]
        return torch.tensor([counts + [1] * (drafts + 1 - len(counts))], dtype=torch.int32)
