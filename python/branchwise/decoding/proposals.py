"""What drafters propose, held to the protocol: a drafter may guess wrong, but it must not change the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tree import DrawKind, RowTree


def check_proposals(
    trees: Sequence[RowTree], budgets: Sequence[int], roots: Sequence[int], vocabulary: int, draws: DrawKind
) -> list[RowTree]:
    """The trees, cut to their budgets if they were not drawn.

    Args:
        trees: as proposed.
        budgets: most nodes of each row, root included.
        roots: last token of each row.
        vocabulary: number of tokens of the target.
        draws: how the drafter draws.

    Raises:
        ValueError: another number of trees than rows, another root, a token outside the vocabulary; of drawn trees,
            more nodes than the budget (cutting them would bias the text), or no draft distributions.
    """
    if len(trees) != len(budgets):
        raise ValueError(f"the drafter must propose one tree per row, {len(budgets)}, got {len(trees)}")
    tokens = np.concatenate([tree.tokens for tree in trees])
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= vocabulary:
        raise ValueError(f"the drafter's tokens must lie between 0 and {vocabulary - 1}, got {low} to {high}")
    for tree, budget, root in zip(trees, budgets, roots, strict=True):
        if tree.tokens[0] != root:
            raise ValueError(f"the drafter's root must be the row's last token {root}, got {tree.tokens[0]}")
        if tree.fixed > budget:
            raise ValueError(f"a drafter must keep its fixed nodes within its budget of {budget}, got {tree.fixed}")
        if draws is DrawKind.DETERMINISTIC:
            continue
        if len(tree) > 1 and tree.draft is None:
            raise ValueError(f"a drafter that draws {draws.value} must hand over what it drew from, as draft")
        if tree.draft is not None and (tree.draft.dim() != 2 or tree.draft.shape[1] != vocabulary):
            raise ValueError(f"draft must have shape [R, {vocabulary}], got {tuple(tree.draft.shape)}")
        if len(tree) > budget:
            raise ValueError(f"a drafter that draws must keep to its budget of {budget} nodes, got {len(tree)}")
    return [tree.first(budget) for tree, budget in zip(trees, budgets, strict=True)]
