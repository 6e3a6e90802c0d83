"""What a row asks of a forward: states of a stretch of its text, as nodes that see each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor


@dataclass
class Predictions:
    """Of the nodes of a window, where masks are wanted.

    Attributes:
        tokens, scores: i64[n], f32[n]; -inf where none is wanted.
        choices, chances: the likeliest tokens i64[n, k] and their probabilities f32[n, k], if asked for.
    """

    tokens: np.ndarray
    scores: np.ndarray
    choices: np.ndarray | None = None
    chances: np.ndarray | None = None


class Kind(Enum):
    LOOK = 0  # predictions for the state as it is
    REFRESH = 1  # the same for the whole text, whose keys are then kept
    VERIFY = 2  # predictions at drafts


@dataclass
class Window:
    """What a row wants to know: predictions at the masks of some states of one stretch of its text.

    A node is a token of a state in a forward. States of a full model have nodes of their own. Those of a block-causal
    one form a tree of blocks: what is alike up to a block's end is there once, and of a state only what lies up to its
    first block with masks, as that is all that its next step depends on; where the last state has but few left in that
    block, it is there as a whole.

    Attributes:
        states: i64[k, W].
        start: position of the first token.
        block: tokens that see each other, 0 for all.
        width: nodes that lie side by side and see each other: a block's, or a state's.
        nodes: i64[k, W], which node a token is; -1: none.
        sees: bool[n / width, n / width], which groups of so many nodes see which.
        wanted: bool[n], masks whose predictions matter.
        tokens, positions: i64[n].
        held: slots of the row's store that it builds on.
    """

    kind: Kind
    states: Tensor
    start: int
    block: int
    width: int
    nodes: Tensor
    sees: Tensor
    wanted: Tensor
    tokens: Tensor
    positions: Tensor
    held: int

    @classmethod
    def of(
        cls,
        kind: Kind,
        states: np.ndarray,
        start: int,
        block: int,
        mask_id: int,
        current: int,
        limit: int,
        held: int,
        ahead_below: int = 0,
    ) -> Window:
        """``states``: i64[k, W]. ``current``, ``limit``: positions between which masks are wanted; all states are alike
        before ``current``, where a block begins. ``ahead_below``: masks of its block up to which the last state looks
        at what follows."""
        if block:
            nodes, sees = _tree_of_blocks(states, current - start, block, mask_id, ahead_below)
        else:
            nodes, sees = _side_by_side(states)
        width = block or states.shape[1]
        there = nodes >= 0
        tokens, positions = np.zeros(len(sees) * width, np.int64), np.zeros(len(sees) * width, np.int64)
        tokens[nodes[there]] = states[there]
        positions[nodes[there]] = there.nonzero()[1] + start
        wanted = (tokens == mask_id) & (positions >= current) & (positions < limit)
        tensor = torch.from_numpy
        return cls(
            kind,
            tensor(states),
            start,
            block,
            width,
            nodes=tensor(nodes),
            sees=tensor(sees),
            wanted=tensor(wanted),
            tokens=tensor(tokens),
            positions=tensor(positions),
            held=held,
        )

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Of every node, a state that it belongs to and its place there, i64[n] each."""
        state, at = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        for i in reversed(range(len(self.states))):
            there = torch.nonzero(self.nodes[i] >= 0).flatten()
            state[self.nodes[i, there]], at[self.nodes[i, there]] = i, there
        return state, at


def _side_by_side(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k, W = states.shape
    return np.arange(k * W).reshape(k, W), np.eye(k, dtype=bool)


def _tree_of_blocks(
    states: np.ndarray, base: int, block: int, mask_id: int, ahead_below: int
) -> tuple[np.ndarray, np.ndarray]:
    """``base``: tokens that all states share, whole blocks."""
    k, W = states.shape
    nodes = np.full((k, W), -1)
    nodes[:, :base] = np.arange(base)
    known: dict[tuple[int, bytes], int] = {}
    paths: list[list[int]] = []  # of every group of nodes, the first nodes of those before it and its own
    for i, state in enumerate(states):
        masked = (state == mask_id).nonzero()[0]
        last = int(masked[0]) // block if len(masked) else W // block - 1
        # The last state looks ahead, for guesses about blocks behind its own; of use when that is nearly done.
        if i == k - 1 and (masked // block == last).sum() <= ahead_below:
            last = W // block - 1
        path: list[int] = []
        for begin in range(base, (last + 1) * block, block):
            key = (begin, state[base : begin + block].tobytes())
            if key not in known:
                known[key] = base + len(paths) * block
                paths.append([*path, known[key]])
            path.append(known[key])
            nodes[i, begin : begin + block] = np.arange(known[key], known[key] + block)
    shared = base // block
    sees = np.zeros((shared + len(paths), shared + len(paths)), bool)
    sees[:, :shared] = np.tri(len(sees), shared, dtype=bool)
    for i, path in enumerate(paths, start=shared):
        sees[i, [first // block for first in path]] = True
    return nodes, sees
