"""Which states a text may go through: a tree of guesses about positions and tokens, likeliest first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

RANKS, TOKENS = 3, 3  # positions and tokens that a step is guessed to take
_DEEPEST = 3  # depths from here on are one
_WEIGHT = 20.0  # observations that a prior is worth


@dataclass
class Chances:
    """How often a step takes the position that was the r-th surest some steps ago, and the t-th likeliest token there.

    Counted per depth, and per bucket of how sure the model was. The first values are lines through what was counted
    with the model that comes with the sources.
    """

    ranks: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    tokens: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def of_ranks(self, depth: int, lead: float) -> list[float]:
        """``lead``: the second surest score over the surest."""
        p = 0.97 - 0.5 * lead
        return self._entry(self.ranks, depth, int(lead * 3.999), p)

    def of_tokens(self, depth: int, chance: float) -> list[float]:
        """``chance``: the likeliest token's probability."""
        return self._entry(self.tokens, depth, int(chance * 3.999), 0.5 + 0.48 * chance)

    def observe(self, depth: int, lead: float, rank: int, chance: float, token: int) -> None:
        """A step has taken this rank and this token; numbers beyond the guessed ones count together."""
        self.of_ranks(depth, lead)[min(rank, RANKS)] += 1
        self.of_tokens(depth, chance)[min(token, TOKENS)] += 1

    @staticmethod
    def _entry(table: dict[tuple[int, int], list[float]], depth: int, bucket: int, first: float) -> list[float]:
        """``first``: the share of the first, before anything was seen."""
        key = (min(depth, _DEEPEST), bucket)
        if key not in table:
            table[key] = [_WEIGHT * first] + [_WEIGHT * (1 - first) * share for share in (0.5, 0.2, 0.3)]
        return table[key]


@dataclass
class Guess:
    """A state behind the certain next one.

    Attributes:
        added: position -> token, beyond the certain state.
        steps: of the way that it was guessed by: depth, lead, rank, chance and token of each.
    """

    added: dict[int, int]
    steps: list[tuple[int, float, int, float, int]]


class Guesser:
    """Predictions of one moment, as lists over a window.

    Args:
        masked: positions of masks, the certain step's not among them.
        block_of: a position's block.
        scores: how sure the model is of every position; -inf where it was not asked.
        choices, chances: its likeliest tokens there and their probabilities, likeliest first.
        table: what is known of such guesses.
    """

    def __init__(
        self,
        masked: Sequence[int],
        block_of: Sequence[int],
        scores: Sequence[float],
        choices: Sequence[Sequence[int]],
        chances: Sequence[Sequence[float]],
        table: Chances,
    ) -> None:
        self._order = sorted(masked, key=lambda i: (block_of[i], -scores[i], i))
        self._block_of, self._scores = block_of, scores
        self._choices, self._chances, self._table = choices, chances, table

    def left(self, added: dict[int, int]) -> list[int]:
        """Masks of the block that the next step is in, surest first; none where one was not asked about."""
        rest = [i for i in self._order if i not in added]
        here = [i for i in rest if self._block_of[i] == self._block_of[rest[0]]] if rest else []
        return here if all(self._scores[i] > float("-inf") for i in here) else []

    def lead(self, left: Sequence[int]) -> float:
        if len(left) < 2:
            return 0.0
        return max(min(self._scores[left[1]] / self._scores[left[0]], 1.0), 0.0) if self._scores[left[0]] > 0 else 1.0

    def observe(self, guess: Guess, position: int, token: int) -> None:
        """The step that was taken after a guess."""
        left = self.left(guess.added)
        if position in left:
            choices = list(self._choices[position])
            place = choices.index(token) if token in choices else TOKENS
            chance = self._chances[position][0]
            self._table.observe(len(guess.added) + 1, self.lead(left), left.index(position), chance, place)

    def grow(self, count: int, least: float) -> list[Guess]:
        """The likeliest states of a chance of at least ``least``, fewer tokens first; the same state reached in two
        orders is one."""
        found: dict[frozenset[tuple[int, int]], Guess] = {}
        queue: list[tuple[float, int, Guess]] = []
        serial, most = 0, -log(max(least, 1e-30))

        def push(guess: Guess, cost: float) -> None:
            nonlocal serial
            left = self.left(guess.added)
            depth, lead = len(guess.added) + 1, self.lead(left)
            if not left:
                return
            ranks = self._table.of_ranks(depth, lead)
            for rank, position in enumerate(left[:RANKS]):
                place = cost - log(ranks[rank] / sum(ranks))
                if place > most:
                    continue
                chance = self._chances[position][0]
                tokens = self._table.of_tokens(depth, chance)
                for token, choice in enumerate(self._choices[position]):
                    whole = place - log(tokens[token] / sum(tokens))
                    if whole <= most:
                        serial += 1
                        steps = [*guess.steps, (depth, lead, rank, chance, token)]
                        heapq.heappush(queue, (whole, serial, Guess({**guess.added, position: choice}, steps)))

        push(Guess({}, []), 0.0)
        while queue and len(found) < count:
            cost, _, guess = heapq.heappop(queue)
            key = frozenset(guess.added.items())
            if key in found:
                continue
            found[key] = guess
            push(guess, cost)
        return sorted(found.values(), key=lambda guess: len(guess.added))
