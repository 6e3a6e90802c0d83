"""How a run cuts its texts into blocks, and what its decoder knows."""

from __future__ import annotations

from dataclasses import dataclass

from .chances import ChainChances, Chances, Neighbours
from .pace import Pace
from .rules import StepRule
from .spec import DiffusionSpec

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
        table, neighbours: what is known of guesses, for states that form a tree; None: one chain of states.
        least_chance: of a state of a tree that is worth its place.
        pace, chain: decide how many states pay, of trees and chains; None: as many as there are.
    """

    spec: DiffusionSpec
    rule: StepRule
    cache: str
    block: int
    ahead: int
    draft_length: int
    table: Chances | None = None
    neighbours: Neighbours | None = None
    least_chance: float = 0.0
    pace: Pace | None = None
    chain: ChainChances | None = None

    @property
    def guesses(self) -> bool:
        """Whether states form a tree: where every step unmasks one token."""
        return self.table is not None and self.rule.rule == "count" and set(self.rule.counts(self.block)) <= {1}
