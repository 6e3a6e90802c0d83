"""How many masks a step removes, and which first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class StepRule(Protocol):
    """Attributes:
    rule, level: as :func:`branchwise.ops.draft_blocks` takes them.
    score: as :func:`branchwise.ops.confidence` takes it.
    """

    @property
    def rule(self) -> str: ...
    @property
    def level(self) -> float: ...
    @property
    def score(self) -> str: ...

    def counts(self, masks: int) -> list[int]:
        """Tokens that the steps of a block with so many masks fix, where the rule is "count"."""
        ...


@dataclass(frozen=True)
class Static:
    """A fixed number of steps per block: low-confidence remasking (LLaDA; Nie et al. 2025, arXiv 2502.09992).

    Args:
        steps: per block; None for one token per step. A block with m masks gives ``m // steps`` or one more to each,
            the larger shares first.
        score: what surest means, see :func:`branchwise.ops.confidence`.
    """

    steps: int | None = None
    score: str = "probability"
    rule = "count"
    level = 0.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def counts(self, masks: int) -> list[int]:
        steps = masks if self.steps is None else self.steps
        shares = [masks // steps + (i < masks % steps) for i in range(steps)] if steps else []
        return [n for n in shares if n]


@dataclass(frozen=True)
class TimeSchedule:
    """Dream's schedule: masks fall with a time that runs evenly from 1 to ``end`` (Ye et al. 2025, arXiv 2508.15487).

    Args:
        steps: per block.
        score: "probability" is its maskgit_plus, "margin" topk_margin, "entropy" entropy.
        end: the last time.
    """

    steps: int
    score: str = "entropy"
    end: float = 1e-3
    rule = "count"
    level = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.end < 1:
            raise ValueError(f"end must lie between 0 and 1, got {self.end}")

    def counts(self, masks: int) -> list[int]:
        times = [1 - (1 - self.end) * i / self.steps for i in range(self.steps + 1)]
        shares = []
        for i in range(self.steps):
            last = i == self.steps - 1
            shares.append(masks if last else int(masks * (1 - times[i + 1] / times[i])))
            masks -= shares[-1]
        return [n for n in shares if n]


@dataclass(frozen=True)
class Threshold:
    """Every token with a probability of at least ``threshold``, and at least one (Fast-dLLM; arXiv 2505.22618)."""

    threshold: float = 0.9
    rule = "threshold"
    score = "probability"

    @property
    def level(self) -> float:
        return self.threshold

    def counts(self, masks: int) -> list[int]:
        return [1] * masks


@dataclass(frozen=True)
class EntropyBudget:
    """The surest tokens as long as their entropies add up to at most ``budget`` nats, and at least one (SDAR)."""

    budget: float = 0.35
    rule = "budget"
    score = "entropy"

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"budget must be at least 0, got {self.budget}")

    @property
    def level(self) -> float:
        return self.budget

    def counts(self, masks: int) -> list[int]:
        return [1] * masks
