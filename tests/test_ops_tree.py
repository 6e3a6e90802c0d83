"""build_tree against its Python definition."""

import pytest
import torch

from attention_cases import random_parents
from branchwise import ops
from branchwise.ops.tree import build_tree_reference


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65, 128, 200])
def test_build_tree(T):
    g = torch.Generator().manual_seed(T)
    parents, seq_lens = random_parents(5, T, g), torch.randint(0, 99, (5,), generator=g).int()
    for actual, expected in zip(
        ops.build_tree(parents, seq_lens), build_tree_reference(parents, seq_lens), strict=True
    ):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_build_tree_by_hand():
    #     0
    #    / \
    #   1   2      node 5 is padding
    #   |   |
    #   3   4
    mask, positions, child, sibling = ops.build_tree(i32([[-1, 0, 0, 1, 2, -1]]), i32([10]))
    assert [bin(w) for w in mask[0, :, 0]] == ["0b1", "0b11", "0b101", "0b1011", "0b10101", "0b100000"]
    assert positions[0].tolist() == [10, 11, 11, 12, 12, 10]
    assert child[0].tolist() == [1, 3, 4, -1, -1, -1]
    assert sibling[0].tolist() == [-1, 2, -1, -1, -1, -1]


def test_build_tree_refuses():
    with pytest.raises(RuntimeError, match=r"parents\[0, 1\] = 1 must be -1"):
        ops.build_tree(i32([[-1, 1]]), i32([0]))
    with pytest.raises(RuntimeError, match=r"parents\[0, 1\] = -2"):
        ops.build_tree(i32([[-1, -2]]), i32([0]))
    with pytest.raises(RuntimeError, match=r"parents must be int32, got int64"):
        ops.build_tree(torch.tensor([[-1, 0]]), i32([0]))
    with pytest.raises(RuntimeError, match=r"seq_lens.size\(0\) must be B = 1"):
        ops.build_tree(i32([[-1, 0]]), i32([0, 0]))


def test_opcheck():
    parents = random_parents(2, 9, torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.branchwise.build_tree, (parents, i32([3, 4])))
