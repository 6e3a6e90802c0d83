"""FreeDave: the parallel predictions of one forward are the drafts that the next one verifies (card freedave)."""

from __future__ import annotations

from typing import Any

from .chances import ChainChances, Chances, Neighbours
from .decoder import BlockDecoder


class FreeDave(BlockDecoder):
    """Gives the text of :class:`BlockDecoder` with the same options, in fewer forwards (Wu and Zhang 2025, arXiv
    2510.00294).

    A forward sees the next ``draft_length`` states of a row, all made from the last predictions; the first is certain.
    Where the step from a right state gives the next one, that is right, too. So a forward proves one step at least and
    as many as agree. States share the keys before them. Exact in real arithmetic for every rule and cache, and to the
    bit where the model's linear layers give a row the same bits among more rows; elsewhere near-ties may fall
    otherwise.

    Beyond the published loop: keys of finished blocks are taken from the forward that proved them instead of a
    forward of their own, and predictions for the next block are carried over, so that blocks need no first forward.

    Args:
        draft_length: most states per forward; 1 is the decoder without drafts.
        drafts: "tree": where every step unmasks one token, states are a tree of guesses about which position comes
            next and with which of its likeliest tokens, by what turned out so far (an addition of ours); other rules
            have a chain. "chain": as published, the states that follow if predictions stay as they are.
        least_chance: a tree has no state that is less likely to be reached than this. None: both kinds of drafts have
            as many states as give the most steps per second, by how often states were reached and how long forwards of
            every size took; so their number is that of the machine, and differs between runs.
        eager: drafts may reach blocks behind the current one, as far as ``draft_length`` steps go; not with the caches
            "prefix" and "dual".
        others: as for :class:`BlockDecoder`.

    Raises:
        ValueError: as :class:`BlockDecoder`, for a ``draft_length`` outside 1..64 or unknown ``drafts``.
    """

    def __init__(
        self,
        rule: Any = None,
        draft_length: int = 8,
        eager: bool = True,
        drafts: str = "tree",
        least_chance: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(rule, **options)
        if not 1 <= draft_length <= 64:
            raise ValueError(f"draft_length must lie between 1 and 64, got {draft_length}")
        if drafts not in ("tree", "chain"):
            raise ValueError(f"drafts must be 'tree' or 'chain', got {drafts!r}")
        self.draft_length, self.eager, self.drafts = draft_length, eager, drafts
        if least_chance is not None and not 0 <= least_chance <= 1:
            raise ValueError(f"least_chance must lie in [0, 1], got {least_chance}")
        self.least_chance = least_chance
        self.table = Chances() if drafts == "tree" else None
        self.neighbours, self.chain = Neighbours(), ChainChances()

    def _ahead(self, block: int) -> int:
        """Blocks that ``draft_length`` steps can reach behind the current one."""
        if not self.eager:
            return 0
        steps = max(len(self.rule.counts(block)), 1)
        return -(-self.draft_length // steps)
