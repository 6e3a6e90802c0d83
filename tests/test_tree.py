"""RowTree and TokenTree."""

import numpy as np
import pytest
import torch

from branchwise import RowTree, TokenTree


def row(tokens, parents):
    return RowTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.ones(len(tokens), np.float32))


def test_paths_children_and_prefixes():
    tree = row([5, 1, 2, 3, 1], [-1, 0, 0, 2, 2])
    assert tree.path(0) == [] and tree.path(3) == [2, 3] and tree.path(4) == [2, 1]
    assert len(tree.first(3)) == 3 and tree.first(9) is tree
    batch = TokenTree([tree, RowTree.root(7)], torch.tensor([10, 4], dtype=torch.int32))
    assert batch.shape == (2, 5)
    assert batch.positions.tolist() == [[10, 11, 11, 12, 12], [4] * 5]
    assert batch.tokens[1].tolist() == [7] * 5
    assert not batch.is_chain


def test_chains_need_no_mask():
    chain = RowTree.chain(3, [4, 5], np.array([0.5, 0.4]))
    lens = torch.zeros(2, dtype=torch.int32)
    assert TokenTree([chain, RowTree.root(1)], lens).is_chain
    assert not TokenTree([chain, row([1, 2, 3], [-1, 0, 0])], lens).is_chain


@pytest.mark.parametrize("parents", [[0, 0], [-1, 1], [-1, -1], [-1, 5]])
def test_refuses_parents_that_are_no_tree(parents):
    with pytest.raises(ValueError, match="parents must be -1 for the root"):
        row([1, 2], parents)


def test_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="one equal length of at least 1, got 0"):
        row([], [])


def test_leaving_nodes_out():
    tree = row([5, 1, 2, 3, 1], [-1, 0, 0, 2, 2])
    kept = tree.only(np.array([True, False, True, False, True]))
    assert kept.tokens.tolist() == [5, 2, 1] and kept.parents.tolist() == [-1, 0, 1] and kept.fixed == 1
    with pytest.raises(ValueError, match=r"keep must hold the root, got \[False, True, True, True, True\]"):
        tree.only(np.arange(5) > 0)


def test_other_names_are_asked_for_when_rows_are_read():
    batch = TokenTree([row([5, 1], [-1, 0]), RowTree.root(7)], torch.zeros(2, dtype=torch.int32))
    asked = []
    named = batch.named(lambda: asked.append(1) or [np.int32([3, 4]), np.int32([9])])
    assert named.shape == batch.shape and not asked
    assert [r.ids.tolist() for r in named.rows] == [[3, 4], [9]] and named.rows is named.rows and len(asked) == 1
    assert batch.rows[0].ids is None
