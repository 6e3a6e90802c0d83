"""The ops over several rounds, with a draft that differs from the target: chi-square of three tokens of a bigram
model."""

import pytest
import torch

from branchwise import ops
from branchwise.noise import Purpose
from chi_square import chi_square
from verify_cases import RULES

V = 16
g = torch.Generator().manual_seed(1)
P = (torch.randn(V, V, generator=g) * 1.5).softmax(-1)  # target, by the last token
Q = (0.5 * P.log() + torch.randn(V, V, generator=g)).softmax(-1)  # draft
LAW = (P[0][:, None, None] * P[:, :, None] * P[None]).double().flatten()  # of three tokens after token 0

#: rule: (children per node, levels, how they are drawn)
DRAFTS = {
    "match": (2, 2, "likeliest"),
    "each_child": (2, 2, "likeliest"),
    "one_coin": (3, 2, "likeliest"),
    "chain": (1, 3, "with"),
    "with_replacement": (2, 2, "with"),
    "without_replacement": (2, 2, "without"),
    "block": (1, 3, "with"),
    "traversal_with": (2, 2, "with"),
    "traversal_without": (3, 2, "without"),
}


def draw_children(last, k, how):
    """i64[n, k] children after the tokens ``last``, in order of drawing."""
    if how == "likeliest":
        return Q[last].topk(k).indices
    return torch.multinomial(Q[last], k, replacement=how == "with", generator=g)


def draw_trees(last, k, levels, how):
    """Tokens i64[B, T] and the one parent list of complete trees."""
    tokens, parents, level = [last], [-1], [0]
    for _ in range(levels):
        below = []
        for node in level:
            for child in draw_children(tokens[node], k, how).T:
                below.append(len(tokens))
                tokens.append(child)
                parents.append(node)
        level = below
    return torch.stack(tokens, 1), parents


def three_tokens(trials, rule, k, levels, how, same_coin=False, same_round=False):
    """Rounds of drafting and verification until every row has three tokens; counts of the 4096 texts."""
    op, reads_draft, _ = RULES[rule]
    text = torch.zeros(trials, 16, dtype=torch.int64)
    length = torch.ones(trials, dtype=torch.int64)
    seeds, rows = torch.full((trials,), 99), torch.arange(trials)
    accepted_nodes = 0
    while (length < 4).any():
        last = text.gather(1, length[:, None] - 1)[:, 0]
        tokens, parents = draw_trees(last, k, levels, how)
        T = tokens.shape[1]
        parents = torch.tensor(parents, dtype=torch.int32).expand(trials, T).contiguous()
        _, _, child, sibling = ops.build_tree(parents, torch.zeros(trials, dtype=torch.int32))
        rounds = (torch.zeros_like(length) if same_round else length)[:, None].expand(trials, T).contiguous()
        u = ops.node_uniforms(seeds, rows, rounds, torch.arange(T).expand(trials, T).contiguous(), Purpose.VERIFY)
        if same_coin:
            u[..., 1] = u[..., 0]
        tree = tokens, child, sibling, P.log()[tokens]
        path, count, bonus = op(ops, (*tree, Q, tokens.int()) if reads_draft else tree, u)
        accepted_nodes += int(count.sum()) - trials
        emitted = tokens.gather(1, path.clamp(min=0).long())
        emitted = torch.cat([emitted[:, 1:], bonus[:, None]], 1).scatter(1, (count - 1)[:, None].long(), bonus[:, None])
        for j in range(emitted.shape[1]):
            here = (j < count) & (length < 16)
            text[rows[here], length[here]] = emitted[here, j]
            length += here
    cells = (text[:, 1] * V + text[:, 2]) * V + text[:, 3]
    return torch.bincount(cells, minlength=V**3), accepted_nodes


@pytest.mark.parametrize("trials", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", DRAFTS)
def test_several_rounds_keep_the_law(rule, trials):
    counts, accepted = three_tokens(trials, rule, *DRAFTS[rule])
    statistic, limit = chi_square(counts, LAW, trials)
    assert statistic < limit
    assert accepted > trials / 3  # the law was kept with drafts accepted, not without


#: Planted bugs: what they do to a call.
WRONG = {
    "with-replacement rule on likeliest children": ("with_replacement", (2, 2, "likeliest"), {}),
    "with-replacement rule on draws without": ("with_replacement", (4, 2, "without"), {}),
    "the accepting coin draws the bonus, too": ("chain", (1, 3, "with"), {"same_coin": True}),
    "every round has the same noise": ("match", (2, 2, "likeliest"), {"same_round": True}),
    "typical acceptance": ("typical", (2, 2, "likeliest"), {}),
    "thresholds": ("thresholds", (2, 2, "likeliest"), {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_planted_bugs_are_noticed(name):
    rule, draft, bug = WRONG[name]
    counts, _ = three_tokens(200_000, rule, *draft, **bug)
    statistic, limit = chi_square(counts, LAW, 200_000)
    assert statistic > limit, (statistic, limit)
