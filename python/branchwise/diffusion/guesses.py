"""Which states a text may go through: a tree of guesses about positions and tokens, likeliest first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from .chances import RANKS, TOKENS, Belief, Chances, Neighbours, mix

Step = tuple[int, float, int, float, int]  # depth, lead, rank, chance and token, as Chances counts them


@dataclass
class Guess:
    """A state behind the certain next one.

    Attributes:
        added: position -> token, beyond the certain state.
        steps: of the way that it was guessed by.
        beliefs: of the positions beside those that were added; of the others, what the model said.
        chance: that it is reached that way.
    """

    added: dict[int, int]
    steps: list[Step]
    beliefs: dict[int, Belief]
    chance: float = 1.0


class Guesser:
    """Predictions of one moment, as lists over a window.

    Args:
        masked: positions of masks, the certain step's not among them.
        block_of: a position's block.
        scores: how sure the model is of every position; -inf where it was not asked.
        choices, chances: its likeliest tokens there and their probabilities, likeliest first.
        table: what is known of such guesses.
        neighbours: what is known of positions beside a token.
        probable: whether scores are the likeliest token's probability, so that beliefs have one, too.
    """

    def __init__(
        self,
        masked: Sequence[int],
        block_of: Sequence[int],
        scores: Sequence[float],
        choices: Sequence[Sequence[int]],
        chances: Sequence[Sequence[float]],
        table: Chances,
        neighbours: Neighbours,
        probable: bool = True,
    ) -> None:
        self._masked, self._block_of = frozenset(masked), block_of
        self._said = {i: (scores[i], choices[i], chances[i]) for i in masked}
        self._table, self._neighbours, self._probable = table, neighbours, probable

    def first(self, position: int, token: int) -> Guess:
        """The certain state, which this step leads to."""
        return Guess({}, [], self._placed({}, position, token))

    def left(self, guess: Guess, mixed: bool | None = None) -> list[int]:
        """Masks of the block that the next step is in, surest first; none where one was not asked about.

        ``mixed``: by the guess's beliefs; None: if they help.
        """
        rest = self._masked.difference(guess.added)
        if not rest:
            return []
        block = min(self._block_of[i] for i in rest)
        here = sorted((-self._belief(guess, i, mixed)[0], i) for i in rest if self._block_of[i] == block)
        return [i for _, i in here] if here[-1][0] < float("inf") else []

    def lead(self, guess: Guess, left: Sequence[int]) -> float:
        if len(left) < 2:
            return 0.0
        first, second = self._belief(guess, left[0])[0], self._belief(guess, left[1])[0]
        return max(min(second / first, 1.0), 0.0) if first > 0 else 1.0

    def observe(self, guess: Guess, position: int, token: int) -> None:
        """The step that was taken after a guess."""
        left = self.left(guess)
        if position in left:
            plain = Guess(guess.added, [], {})
            for i, state in enumerate((plain, guess)):
                right = self.left(state, True)[0] == position and self._belief(state, position, True)[1][0] == token
                self._neighbours.judge(i, right)
            _, choices, chances = self._belief(guess, position)
            place = choices.index(token) if token in choices else TOKENS
            self._table.observe(len(guess.added) + 1, self.lead(guess, left), left.index(position), chances[0], place)

    def grow(self, first: Guess, count: int, least: float) -> list[Guess]:
        """The likeliest states behind the first of a chance of at least ``least``, likeliest first; the same state
        reached in two orders is one."""
        found: dict[frozenset[tuple[int, int]], Guess] = {}
        queue: list[tuple[float, int, Guess, int, int, Step]] = []
        serial, most = 0, -log(max(least, 1e-30))

        def push(guess: Guess, cost: float) -> None:
            nonlocal serial
            left = self.left(guess)
            depth, lead = len(guess.added) + 1, self.lead(guess, left)
            if not left:
                return
            ranks = self._table.of_ranks(depth, lead)
            for rank, position in enumerate(left[:RANKS]):
                place = cost - log(ranks[rank] / sum(ranks))
                if place > most:
                    continue
                _, choices, chances = self._belief(guess, position)
                tokens = self._table.of_tokens(depth, chances[0])
                for token, choice in enumerate(choices[:TOKENS]):
                    whole = place - log(tokens[token] / sum(tokens))
                    if whole <= most:
                        serial += 1
                        heapq.heappush(
                            queue, (whole, serial, guess, position, choice, (depth, lead, rank, chances[0], token))
                        )

        push(first, 0.0)
        while queue and len(found) < count:
            cost, _, guess, position, token, step = heapq.heappop(queue)
            added = {**guess.added, position: token}
            key = frozenset(added.items())
            if key in found:
                continue
            beliefs = self._placed(guess.beliefs, position, token)
            found[key] = Guess(added, [*guess.steps, step], beliefs, exp(-cost))
            if len(found) < count:
                push(found[key], cost)
        return list(found.values())

    def _belief(self, guess: Guess, position: int, mixed: bool | None = None) -> Belief:
        mixed = self._neighbours.help if mixed is None else mixed
        return (guess.beliefs.get(position) if mixed else None) or self._said[position]

    def _placed(self, beliefs: dict[int, Belief], position: int, token: int) -> dict[int, Belief]:
        """What is believed once a token stands at a position."""
        found = dict(beliefs)
        for side, at in enumerate((position + 1, position - 1)):
            others = self._neighbours.beside(side, token)
            if others is None or at not in self._said:
                continue
            score, choices, chances = found.get(at) or self._said[at]
            if score > float("-inf"):
                mixed = mix(choices, chances, *others)
                found[at] = mixed if self._probable else (score, *mixed[1:])
        return found
