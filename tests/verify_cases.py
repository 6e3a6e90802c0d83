"""Rows for the verification ops: random trees, targets and drafts, as tensors for the ops and as trees for the
reference."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from branchwise import ops
from branchwise.ops import verify_reference as reference

#: name: (op, whether it reads a draft, reference)
RULES = {
    "greedy": (lambda o, t, u: o.verify_greedy(*t), False, reference.greedy),
    "match": (lambda o, t, u: o.verify_sample(*t, u, "match"), False, reference.match),
    "each_child": (lambda o, t, u: o.verify_sample(*t, u, "each_child"), False, reference.each_child),
    "one_coin": (lambda o, t, u: o.verify_sample(*t, u, "one_coin"), False, reference.one_coin),
    "thresholds": (
        lambda o, t, u: o.verify_sample(*t, u, "one_coin", threshold_single=0.5, threshold_accumulated=0.7),
        False,
        partial(reference.one_coin, threshold_single=0.5, threshold_accumulated=0.7),
    ),
    "chain": (lambda o, t, u: o.verify_chain(*t, u), True, partial(reference.multi_draft, replacement=True)),
    "with_replacement": (
        lambda o, t, u: o.verify_multi_draft(*t, u, True),
        True,
        partial(reference.multi_draft, replacement=True),
    ),
    "without_replacement": (
        lambda o, t, u: o.verify_multi_draft(*t, u, False),
        True,
        partial(reference.multi_draft, replacement=False),
    ),
    "block": (lambda o, t, u: o.verify_block(*t, u), True, partial(reference.traversal, replacement=True)),
    "traversal_with": (
        lambda o, t, u: o.verify_traversal(*t, u, True),
        True,
        partial(reference.traversal, replacement=True),
    ),
    "traversal_without": (
        lambda o, t, u: o.verify_traversal(*t, u, False),
        True,
        partial(reference.traversal, replacement=False),
    ),
    "typical": (lambda o, t, u: o.verify_typical(*t, u), False, reference.typical),
}
for _name, _options in {
    "greedy_match": {},
    "surprisal": {"threshold": 1.5},
    "probability_floor": {"threshold": 0.1, "top_k": 2},
}.items():
    RULES[_name] = (
        lambda o, t, u, name=_name, options=_options: o.verify_policy(*t, u, name, **options),
        False,
        partial(reference.policy, name=_name, **_options),
    )
RULES["surprisal_first"] = (
    lambda o, t, u: o.verify_policy(*t, u, "surprisal", threshold=1.5, first_only=True),
    False,
    partial(reference.policy, name="surprisal", threshold=1.5, first_only=True),
)
RULES["typical_policy"] = (
    lambda o, t, u: o.verify_policy(*t, u, "typical", threshold=0.2, alpha=0.5),
    False,
    partial(reference.policy, name="typical", threshold=0.2, alpha=0.5),
)
CHAINS_ONLY = ("chain", "block")


@dataclass
class Batch:
    """Rows padded to T nodes. ``trees`` hold f64 softmax of the very logits, and the very drafts."""

    tree: tuple  # tokens, next_token, next_sibling, logits
    draft: tuple  # draft, draft_index
    uniforms: torch.Tensor
    trees: list

    def run(self, rule, on=ops):
        """``on``: where the ops are."""
        op, reads_draft, _ = RULES[rule]
        return op(on, (*self.tree, *self.draft) if reads_draft else self.tree, self.uniforms)

    def expected(self, rule, row):
        """The reference's verdict, and its smallest margin."""
        chance = reference.Uniforms(self.uniforms[row].numpy())
        return RULES[rule][2](self.trees[row], chance), chance.margin


MARGIN = 1e-4  # fp32 against fp64: decisions closer than this may differ


def compare(rule, batch, on=ops):
    """Asserts equal verdicts; returns how many rows were too close to call."""
    accepted, count, bonus = batch.run(rule, on)
    close = 0
    for b in range(len(batch.trees)):
        (path, token), margin = batch.expected(rule, b)
        if margin < MARGIN:
            close += 1
            continue
        actual = accepted[b, : count[b]].tolist(), int(bonus[b])
        assert actual == (path, token), (rule, b, margin)
        assert (accepted[b, count[b] :] == -1).all()
    return close


def softmax(logits):
    """f64, of a tensor in the last dimension."""
    return logits.double().softmax(-1).numpy()


def pack(rows, logits, q, uniforms):
    """A batch from (tokens, parents) per row, logits [B, T, V], q f32[B, T, V] and uniforms."""
    B, T, V = logits.shape
    tokens = torch.zeros(B, T, dtype=torch.int64)
    parents = torch.full((B, T), -1, dtype=torch.int32)
    for b, (row_tokens, row_parents) in enumerate(rows):
        tokens[b, : len(row_tokens)] = torch.tensor(row_tokens)
        parents[b, : len(row_parents)] = torch.tensor(row_parents, dtype=torch.int32)
    _, _, child, sibling = ops.build_tree(parents, torch.zeros(B, dtype=torch.int32))
    index = torch.arange(B * T, dtype=torch.int32).view(B, T)
    p, q64 = softmax(logits), q.double().numpy()
    trees = [
        reference.Tree(row_tokens, row_parents, list(p[b, : len(row_tokens)]), list(q64[b, : len(row_tokens)]))
        for b, (row_tokens, row_parents) in enumerate(rows)
    ]
    return Batch((tokens, child, sibling, logits), (q.reshape(B * T, V).contiguous(), index), uniforms, trees)


def random_row(rng, q, n, kind, replacement):
    """Tokens and parents of a tree of up to n nodes whose children are drawn from q[node]."""
    V = q.shape[-1]
    tokens, parents = [0], [-1]
    left = [q[i].astype(np.float64) for i in range(n)]
    for node in range(1, n):
        parent = {"chain": node - 1, "star": 0}.get(kind, int(rng.integers(max(0, node - 4), node)))
        law = left[parent]
        if law.sum() <= 0:
            break  # nothing left to draw
        token = int(rng.choice(V, p=law / law.sum()))
        if not replacement:
            law[token] = 0
        if kind == "duplicates" and parents[-1] == parent and rng.random() < 0.5:
            token = tokens[-1]
        tokens.append(token)
        parents.append(parent)
    return tokens, parents


def random_batch(rule, seed, B=64, V=7, dtype=torch.float32, longest=10):
    """Random shapes (single roots, stars, chains, duplicates, padding), drawn as the rule wants them."""
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(seed)
    T = int(rng.integers(1, longest + 1))
    spread = float(rng.choice([0.5, 1.5, 4.0]))
    logits = (torch.randn(B, T, V, generator=g) * spread).to(dtype)
    q = (0.7 * logits.float() + torch.randn(B, T, V, generator=g)).softmax(-1)
    if seed % 3 == 0:  # filtered targets and drafts
        logits[torch.rand(B, T, V, generator=g) < 0.4] = -torch.inf
        logits[..., 0] = 0.0
        q = q * (torch.rand(B, T, V, generator=g) < 0.7)
        q[..., -1] += 1e-3
        q = q / q.sum(-1, keepdim=True)
    replacement = rule not in ("without_replacement", "traversal_without", "each_child")
    kinds = ["chain"] if rule in CHAINS_ONLY else ["chain", "star", "tree", "tree", "duplicates"]
    sizes = rng.integers(1, T + 1, size=B)
    rows = [random_row(rng, q[b].numpy(), int(sizes[b]), str(rng.choice(kinds)), replacement) for b in range(B)]
    return pack(rows, logits, q, torch.rand(B, T, 2, generator=g))
