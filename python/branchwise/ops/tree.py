"""Token trees as tensors: from parents to masks. Card tree-verify, "Data layout"."""

from itertools import pairwise

import torch
from torch import Tensor


def build_tree(parents: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything the model and the verifier need to know about a batch of trees.

    Args:
        parents: i32[B, T], contiguous; node 0 is the root. ``parents[b, i]`` is a node before i, or -1 for the root
            and for padding, which sees only itself and is not reachable.
        seq_lens: i32[B], P of each row.

    Returns:
        ``tree_mask`` i64[B, T, ceil(T/64)] ancestor bits; ``positions`` i64[B, T] = P + depth; ``next_token``
        i32[B, T] first child or -1; ``next_sibling`` i32[B, T] next child of the same parent in ascending order, or -1.

    Raises:
        RuntimeError: a parent is not before its child, or a shape or dtype is wrong.
    """
    return torch.ops.branchwise.build_tree(parents, seq_lens)


@torch.library.register_fake("branchwise::build_tree")
def _(parents, seq_lens):
    B, T = parents.shape
    return (
        parents.new_empty(B, T, (T + 63) // 64, dtype=torch.int64),
        parents.new_empty(B, T, dtype=torch.int64),
        torch.empty_like(parents),
        torch.empty_like(parents),
    )


def build_tree_reference(parents: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of :func:`build_tree` with Python integers."""
    B, T = parents.shape
    W = (T + 63) // 64
    mask, positions = torch.zeros(B, T, W, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
    next_token, next_sibling = torch.full_like(parents, -1), torch.full_like(parents, -1)
    for b in range(B):
        bits: list[int] = []
        children: list[list[int]] = [[] for _ in range(T)]
        for i, parent in enumerate(parents[b].tolist()):
            bits.append((bits[parent] if parent >= 0 else 0) | 1 << i)
            positions[b, i] = int(seq_lens[b]) + bits[i].bit_count() - 1
            if parent >= 0:
                children[parent].append(i)
            for w in range(W):
                word = bits[i] >> (64 * w) & (1 << 64) - 1
                mask[b, i, w] = word - (1 << 64) if word >> 63 else word
        for siblings in children:
            for left, right in pairwise(siblings):
                next_sibling[b, left] = right
        for i, siblings in enumerate(children):
            next_token[b, i] = siblings[0] if siblings else -1
    return mask, positions, next_token, next_sibling
