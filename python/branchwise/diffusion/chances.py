"""What is learned about guesses: how often they come true, and what the model says beside a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

RANKS, TOKENS = 3, 3  # positions and tokens that a step is guessed to take
CHOICES = 4  # tokens whose probabilities are known of a position
_DEEPEST = 3  # depths from here on are one
_WEIGHT = 20.0  # observations that a prior is worth
_FLOOR = 0.03  # added to probabilities, as a token that is not among the likeliest may still come
_FADE = 0.99  # per step
_REMEMBERED = 8192  # tokens whose neighbours are known
_CHAIN, _CHAIN_WEIGHT = 0.6, 10.0  # of a chain's next state, before anything was seen

Belief = tuple[float, Sequence[int], Sequence[float]]  # score of a position, its likeliest tokens, their probabilities


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


class Neighbours:
    """What the model last said of the position behind a token, and of the one before it.

    A step changes most what is believed of the positions beside it, and no forward has seen that yet. But often one has
    seen the same token elsewhere, or here in a state that was not reached (as Token Recycling does for texts that grow
    to the right, Luo et al. 2024, arXiv 2408.08696).

    Attributes:
        hits: how often the likeliest next step was right, without and with what is known here; the past fades.
    """

    def __init__(self) -> None:
        self._said: tuple[dict[int, tuple[Sequence[int], Sequence[float]]], ...] = ({}, {})
        self.hits = [0.0, 0.0]

    @property
    def help(self) -> bool:
        """Not all models look at neighbours: those with random weights don't."""
        return self.hits[1] >= self.hits[0]

    def observe(self, side: int, token: int, choices: Sequence[int], chances: Sequence[float]) -> None:
        """``side``: 0 behind the token, 1 before it."""
        said = self._said[side]
        said.pop(token, None)  # the last that was seen stands last
        said[token] = (choices, chances)
        if len(said) > _REMEMBERED:
            del said[next(iter(said))]

    def judge(self, used: int, right: bool) -> None:
        """Whether the likeliest next step was right, without (0) or with (1) what is known here."""
        self.hits[used] = _FADE * self.hits[used] + right

    def beside(self, side: int, token: int) -> tuple[Sequence[int], Sequence[float]] | None:
        return self._said[side].get(token)


def mix(choices: Sequence[int], chances: Sequence[float], others: Sequence[int], theirs: Sequence[float]) -> Belief:
    """Two opinions about one position as one: the geometric mean, and as a score the likeliest token's share."""
    first, second = dict(zip(choices, chances, strict=True)), dict(zip(others, theirs, strict=True))
    tokens = first | second
    mean = {t: sqrt((first.get(t, 0.0) + _FLOOR) * (second.get(t, 0.0) + _FLOOR)) for t in tokens}
    whole = sum(mean.values())
    best = sorted(tokens, key=mean.__getitem__, reverse=True)[:CHOICES]
    return mean[best[0]] / whole, best, [mean[t] / whole for t in best]


class ChainChances:
    """How often the state at a depth of a chain was right, given that those before it were."""

    def __init__(self) -> None:
        self._tried: list[float] = []
        self._right: list[float] = []

    def reached(self, count: int) -> list[float]:
        """Chances that the first states behind the certain one are reached."""
        self._grow(count)
        shares = [right / tried for right, tried in zip(self._right[:count], self._tried[:count], strict=True)]
        return np.cumprod(shares).tolist()

    def observe(self, count: int, right: int) -> None:
        """Of ``count`` states behind the certain one, the first ``right`` were."""
        self._grow(count)
        for depth in range(min(right + 1, count)):
            self._tried[depth] += 1
            self._right[depth] += depth < right

    def _grow(self, count: int) -> None:
        while len(self._tried) < count:
            self._tried.append(_CHAIN_WEIGHT)
            self._right.append(_CHAIN_WEIGHT * _CHAIN)
