"""What a decoding run did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DecodeStats:
    """Counts and seconds of one ``generate`` call, all rows together.

    Attributes:
        rule: name of the acceptance rule.
        exact: whether that rule keeps the target's distribution.
        forwards: forwards of the target model, the prompt's included.
        row_forwards: the same counted once per row that was still running.
        drafted: draft nodes that were verified (roots not counted).
        accepted: draft nodes that became text.
        emitted: tokens produced.
        seconds_prefill, seconds_draft, seconds_forward, seconds_verify: where the time went; verify includes
            processors, acceptance and the KV commit, which with graphs are part of the forward.
        accepted_flags: per row and emitted token, whether it came from an accepted draft node.
    """

    rule: str = ""
    exact: bool = True
    forwards: int = 0
    row_forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    seconds_prefill: float = 0.0
    seconds_draft: float = 0.0
    seconds_forward: float = 0.0
    seconds_verify: float = 0.0
    accepted_flags: list[list[bool]] = field(default_factory=list, repr=False)

    def add(self, other: DecodeStats) -> None:
        """Counts and seconds of another run of the same rule; flags are those of rows and stay apart."""
        self.rule, self.exact = other.rule, other.exact
        for name in ("forwards", "row_forwards", "drafted", "accepted", "emitted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("seconds_prefill", "seconds_draft", "seconds_forward", "seconds_verify"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens a running row gains per forward; 1 is plain decoding."""
        return self.emitted / max(self.row_forwards, 1)

    @property
    def acceptance(self) -> float:
        """Share of drafted nodes that became text."""
        return self.accepted / max(self.drafted, 1)
