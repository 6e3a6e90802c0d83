"""Searches that sample whole continuations and choose among them: best of n, the first m of k, the best of the
frequent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .branches import Branches, Ends
from .search import Answer, Found, Reward, Search, majority, rewards_of


def _tokens(text: Tensor) -> tuple[int, ...]:
    return tuple(text.tolist())


class BestOfN(Search):
    """The continuation with the highest reward among ``n``, drawn as plain sampling draws them.

    ``found[i].texts`` holds all of them, best first.

    Args:
        n: continuations, and rows of every forward.
        reward: called once per prompt, with the prompt i64[p] and the continuations i64[m_i]; one number each.
        options: as :class:`Search` takes them.
    """

    def __init__(self, n: int, reward: Reward, **options: Any) -> None:
        super().__init__(n, **options)
        self.reward = reward

    def search(self, branches: Branches, root: int) -> Found:
        rows = branches.fork(root, self.width)
        branches.write(rows, self.width)
        texts = [branches.said(row) for row in rows]
        scores = rewards_of(self.reward, branches.prompt, texts)
        order = sorted(range(self.width), key=lambda i: -scores[i])
        return Found([texts[i] for i in order], [scores[i] for i in order])


class BestOfMajority(Search):
    """Of ``n`` continuations those whose answer is frequent, and of these the ``k`` with the highest rewards (card
    shared-prefix-search B, arXiv 2510.03199).

    ``found[i].texts`` holds one text per answer, the best one, at most ``k``; the first is returned.

    Args:
        n: continuations, and rows of every forward.
        reward: called with one text per frequent answer, the first drawn.
        frequency: share of the continuations that an answer must have; if none has, the most frequent are taken.
        answer: of a continuation; its tokens if None.
        k: answers.
        options: as :class:`Search` takes them.

    Raises:
        ValueError: as :class:`Search`; a frequency outside [0, 1], k below 1.
    """

    def __init__(
        self,
        n: int,
        reward: Reward,
        frequency: float = 0.1,
        answer: Answer | None = None,
        k: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(n, **options)
        if not 0 <= frequency <= 1:
            raise ValueError(f"frequency must lie in [0, 1], got {frequency}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.reward, self.frequency, self.answer, self.k = reward, frequency, answer or _tokens, k

    def search(self, branches: Branches, root: int) -> Found:
        rows = branches.fork(root, self.width)
        branches.write(rows, self.width)
        texts = [branches.said(row) for row in rows]
        answers = [self.answer(text) for text in texts]
        counts = Counter(answers)
        least = min(self.frequency * self.width, max(counts.values()))
        first = {answer: texts[answers.index(answer)] for answer in counts if counts[answer] >= least}
        kept = list(first.values())
        scores = rewards_of(self.reward, branches.prompt, kept)
        order = sorted(range(len(kept)), key=lambda i: -scores[i])[: self.k]
        return Found([kept[i] for i in order], [scores[i] for i in order])


class ShortMAtK(Search):
    """Of ``k`` continuations the first ``m`` that finish thinking are written to their ends; the others stop at once.
    The majority of their answers wins, of equally frequent ones the one with the shortest text (short-m@k, Hassid et
    al. 2025, arXiv 2505.17813).

    Who is first is counted in tokens, so it does not depend on drafts. If fewer than ``m`` ever finish thinking, those
    that do are taken, and if none does, all.

    ``found[i].texts`` holds the winner, then the others of the m; scores are minus their lengths.

    Args:
        m, k: see above; k is the number of rows of every forward.
        thought: whether thinking is over, given the continuation's tokens i64[n] so far;
            ``StepEnd(tokenizer, "</think>")`` for many models.
        answer: of a continuation; its tokens if None.
        options: as :class:`Search` takes them.

    Raises:
        ValueError: as :class:`Search`; m outside 1..k.
    """

    def __init__(self, m: int, k: int, thought: Ends, answer: Answer | None = None, **options: Any) -> None:
        super().__init__(k, **options)
        if not 1 <= m <= k:
            raise ValueError(f"m must lie between 1 and k = {k}, got {m}")
        self.m, self.thought, self.answer = m, thought, answer or _tokens

    def search(self, branches: Branches, root: int) -> Found:
        rows = branches.fork(root, self.width)
        branches.write(rows, self.width, self.thought, enough=self._enough)
        done = [row for row in rows if self.thought(branches.said(row))]
        first = sorted(done, key=lambda row: len(branches.said(row)))[: self.m] or rows
        branches.prune([row for row in rows if row not in first])
        branches.write(first, self.m)
        texts = [branches.said(row) for row in first]
        answers = [self.answer(text) for text in texts]
        best = answers.index(majority(answers, [len(text) for text in texts]))
        shortest = min((len(text), i) for i, text in enumerate(texts) if answers[i] == answers[best])[1]
        texts.insert(0, texts.pop(shortest))
        return Found(texts, [-float(len(text)) for text in texts])

    def _enough(self, rows: Sequence[tuple[Tensor, bool]]) -> bool:
        """Nobody who is still thinking can be among the first m any more."""
        finished = sorted(len(said) for said, ended in rows if ended and self.thought(said))
        if len(finished) < self.m:
            return False
        return all(ended or len(said) >= finished[self.m - 1] for said, ended in rows)
