"""Search: what the decoders have in common that fork one prompt (card shared-prefix-search)."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import use_attention
from ..drafters import Drafter
from ..noise import Seed, first_numbers, row_seeds
from .auto import drafter_of
from .branches import Branches
from .call import Call, Decoder
from .monitor import Monitor, watch
from .request import pad_and_stack
from .stats import DecodeStats

Reward = Callable[[Tensor, Sequence[Tensor]], Sequence[float]]  # prompt i64[n], continuations i64[m_i]: a number each
Answer = Callable[[Tensor], Hashable]  # a continuation i64[m]: what counts as its answer


@dataclass
class Found:
    """What a search found for one prompt.

    Attributes:
        texts: continuations i64[m_i], the chosen one first; what the others are, the search says.
        scores: one number per text.
        stats: counts of the model's forwards.
        peak_bytes: most bytes that keys and values took in use at the end of a round of writing.
        trace: what happened, in order, where a search has steps.
    """

    texts: list[Tensor]
    scores: list[float]
    stats: DecodeStats = field(default_factory=DecodeStats)
    peak_bytes: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list, repr=False)


class Search(Decoder):
    """A ``custom_generate`` callable that writes several continuations of a prompt and returns one.

    All of them live in one :class:`branchwise.kv_tree.KVTree`: the prompt and what continuations share are stored once
    and read once per forward. Prompts of a batch are searched one after another. ``found`` describes the last call.

    Args:
        width: branches that write at the same time.
        seed: of the noise; a branch draws as a row of ``num_return_sequences`` equal prompts does under
            :class:`branchwise.PositionKeyedSampler`.
        drafter: what drafts in every branch, a name or a :class:`branchwise.drafters.Drafter`; "none".
        max_nodes: per branch and forward, with a drafter.
        monitor: shows progress, and ends calls early with what there is.

    Raises:
        ValueError: an option outside its range; when called: an unsupported model or request, or no sampling.
    """

    def __init__(
        self,
        width: int,
        seed: Seed = None,
        drafter: str | Drafter = "none",
        max_nodes: int = 8,
        monitor: Monitor | None = None,
    ) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width, self.seed, self.max_nodes, self.monitor = width, seed, max_nodes, monitor
        self.drafter = drafter_of(drafter)
        self.found: list[Found] = []

    @abstractmethod
    def search(self, branches: Branches, root: int) -> Found:
        """Continues the prompt, which is the text of ``root``."""

    def decode(self, call: Call) -> Tensor:
        call.check()
        model, input_ids, config = call.model, call.input_ids, call.config
        if not config.do_sample and self.width > 1:
            raise ValueError(f"{call.decoder} compares continuations that differ: do_sample must be True")
        if call.streamer is not None:
            raise ValueError(f"streamer is not supported by {call.decoder}: which text it returns is known at the end")
        longest, stopping, pad = call.limits()
        starts = call.starts
        # Branches share their row's processors, so they are checked as those of a batch.
        processors = call.row_processors(max(len(starts), self.width))
        seeds = row_seeds(self.seed, len(starts))
        numbers = first_numbers(seeds, call.prompts)
        self.found = []
        texts = []
        with use_attention(model), watch(self.monitor, len(starts) * self.width * (longest - input_ids.shape[1])):
            for row, (start, seed, number) in enumerate(zip(starts, seeds, numbers, strict=True)):
                branches = Branches(
                    model,
                    config,
                    processors[row],
                    stopping,
                    longest,
                    start,
                    seed,
                    self.drafter,
                    self.max_nodes,
                    self.monitor,
                    number,
                )
                found = self.search(branches, branches.root(input_ids[row]))
                found.stats = branches.stats
                found.peak_bytes = branches.peak_bytes
                self.found.append(found)
                texts.append(torch.cat([input_ids[row], found.texts[0]]))
        return pad_and_stack(texts, pad)


def majority(answers: Sequence[Hashable], lengths: Sequence[int]) -> Hashable:
    """The most frequent answer; of equally frequent ones the one with the shortest text."""
    counts = Counter(answers)
    most = max(counts.values())
    return min(
        (length, place, answer)
        for place, (answer, length) in enumerate(zip(answers, lengths, strict=True))
        if counts[answer] == most
    )[2]


def rewards_of(reward: Reward, prompt: Tensor, texts: Sequence[Tensor], unit_for: str = "") -> list[float]:
    """Checked. ``unit_for``: name of a search that needs rewards in [0, 1].

    Raises:
        ValueError: not one number per text, or one that is no number, or outside [0, 1] where that is needed.
    """
    scores = [float(score) for score in reward(prompt, texts)]
    if len(scores) != len(texts):
        raise ValueError(f"reward must give one number per text, {len(texts)}, got {len(scores)}")
    if any(score != score for score in scores):
        raise ValueError(f"reward must give numbers, got {scores}")
    if unit_for and any(not 0 <= score <= 1 for score in scores):
        raise ValueError(f"reward must lie in [0, 1] for {unit_for}, got {scores}")
    return scores
