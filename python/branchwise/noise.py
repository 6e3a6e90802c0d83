"""Noise for sampling: a function of the seed, the prompt and what it is for, so that results repeat in any batch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from . import ops

Seed = int | Sequence[int] | torch.Generator | None


class Purpose(IntEnum):
    """What noise is for; two purposes never share a number."""

    TARGET = 0  # the draw of the target's token at a position, whatever was drafted
    VERIFY = 1  # coins and draws of the rules that weigh drafts
    DRAFT = 2  # the draws of drafters


def row_seeds(seed: Seed, batch_size: int) -> list[int]:
    """One seed per row.

    Args:
        seed: for all rows; or one per row; or where to draw one from: a generator, or None for torch's default one.

    Raises:
        ValueError: another number of seeds than rows.
    """
    if seed is None or isinstance(seed, torch.Generator):
        return [int(torch.randint(0, 2**63 - 1, (), generator=seed))] * batch_size
    if isinstance(seed, int):
        return [seed] * batch_size
    if len(seed) != batch_size:
        raise ValueError(f"seed must be one number, or one per row, {batch_size}, got {len(seed)}")
    return list(seed)


def first_numbers(seeds: Sequence[int], prompts: Sequence[Tensor]) -> list[int]:
    """Where the numbers of each row's branches begin (:meth:`Noise.numbered`): rows of one seed and one prompt draw
    apart, as equal rows of a batch do."""
    return [n << 24 for n in _repeats([_key(s, p.numpy()) for s, p in zip(seeds, prompts, strict=True)])]


class Noise:
    """The noise of the rows of one ``generate`` call.

    A row's key is a hash of its seed and its prompt, without padding; rows with equal seed and prompt are numbered.
    So a row's noise depends neither on the other rows nor on its place among them, and different prompts get
    independent noise.
    """

    def __init__(self, seeds: Sequence[int], prompts: Sequence[np.ndarray]) -> None:
        keys = [_key(seed, prompt) for seed, prompt in zip(seeds, prompts, strict=True)]
        self._keys, self._rows = torch.tensor(keys), torch.tensor(_repeats(keys))

    @classmethod
    def numbered(cls, seed: int, prompt: Tensor, numbers: Sequence[int]) -> Noise:
        """Of texts that continue one prompt i64[n]: text i draws as row ``numbers[i]`` of many equal prompts."""
        return cls.of(torch.full((len(numbers),), _key(seed, prompt.numpy())), torch.tensor(list(numbers)))

    @classmethod
    def of(cls, keys: Tensor, numbers: Tensor) -> Noise:
        """Of rows with such :attr:`keys`; the noise is computed where they are."""
        noise = cls.__new__(cls)
        noise._keys, noise._rows = keys, numbers
        return noise

    def keep(self, rows: Sequence[int]) -> None:
        """The other rows have finished."""
        self._keys, self._rows = self._keys[list(rows)], self._rows[list(rows)]

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """i64[B] each, what :func:`branchwise.ops.node_uniforms` calls seeds and rows."""
        return self._keys, self._rows

    def at_positions(self, positions: Tensor) -> Tensor:
        """For the draw of the target's token: f32[B, N, 2] from i64[B, N], index of the token in its text without
        padding."""
        nodes = torch.zeros_like(positions)
        return ops.node_uniforms(self._keys, self._rows, positions.contiguous(), nodes, Purpose.TARGET)

    def uniforms(self, rounds: Tensor, nodes: Tensor, purpose: Purpose) -> Tensor:
        """f32[B, N, 2] for any pair of numbers i64[B, N]."""
        return ops.node_uniforms(self._keys, self._rows, rounds.contiguous(), nodes.contiguous(), purpose)

    def row_uniforms(self, row: int, rounds: Tensor, nodes: Tensor, purpose: Purpose) -> Tensor:
        """The same for one row: f32[N, 2] for numbers i64[N]."""
        keys, rows = self._keys[row : row + 1], self._rows[row : row + 1]
        return ops.node_uniforms(keys, rows, rounds[None].contiguous(), nodes[None].contiguous(), purpose)[0]

    def position_keys(self, row: int, positions: Tensor) -> Tensor:
        """For draws from whole vocabularies: i64[n] from i64[n] positions of the text without padding; rows are counted
        as they were at first."""
        # Odd factors: distinct keys for distinct positions.
        key, number = int(self._keys[row]), int(self._rows[row])
        return positions * -7046029254386353131 + (key ^ (number * 0x2545F4914F6CDD1D & (2**63 - 1)))

    def at_nodes(self, lengths: Tensor, count: int, purpose: Purpose) -> Tensor:
        """For one round: f32[B, count, 2], given the i64[B] lengths of the texts, which no two rounds share."""
        rounds = lengths[:, None].expand(-1, count).contiguous()
        nodes = torch.arange(count, device=lengths.device).expand(len(lengths), -1).contiguous()
        return ops.node_uniforms(self._keys, self._rows, rounds, nodes, purpose)


def _key(seed: int, prompt: np.ndarray) -> int:
    digest = hashlib.blake2b((seed % 2**64).to_bytes(8, "little"), digest_size=8)
    digest.update(np.ascontiguousarray(prompt, np.int32).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _repeats(keys: Sequence[int]) -> list[int]:
    """How often each key came before."""
    seen: Counter[int] = Counter()
    before = []
    for key in keys:
        before.append(seen[key])
        seen[key] += 1
    return before
