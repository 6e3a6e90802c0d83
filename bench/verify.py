"""The acceptance rules: what a call costs, and how many drafted tokens each rule accepts.

Part 1, time. B rows of T nodes and V tokens (8 x 64 x 152064). Targets are random logits, peaked like a language
model's (their mean entropy is printed); drafts are drawn from a noisier version of them, children without
replacement, in a random tree or a chain. "accepted chain" is the worst case of the walking rules: a chain that is
accepted whole, so that every node is visited. Per rule the time of the op is divided by the time of reading all logits
once (a sum over as many bytes of fp32), interleaved with it. Opponents, on the same rows: torch.softmax of all nodes;
and the rule in eager torch, which softmaxes visited nodes only and walks in Python, row by row. Medians.

Part 2, acceptance (--trees). SmolLM2 in fp32 is the target, the same with its weights rounded to 4 bits (groups of
32) the draft. Contexts are texts that the target sampled after the benchmark's prompts. At each, chains and trees of
14 nodes are drawn or picked from the draft, and every rule verifies the same trees with 400 draws of noise: mean
accepted nodes.

How to read: "x read" below 1 means the rule touched fewer rows than there are. Part 2 is tokens per forward minus one.

Artefacts: eager torch and the ops get the same noise, but the eager rules are not held to the same rounding. Read
bandwidth moves on shared machines; compare columns of one run.

Reference result: see the README, and bench/results.
"""

from __future__ import annotations

import argparse
import random

import torch

import facts
import verify_trees
from branchwise import ops


def make_parents(B: int, T: int, chain: bool) -> torch.Tensor:
    rng = random.Random(0)
    rows = [[-1] + [i - 1 if chain else rng.randrange(max(0, i - 6), i) for i in range(1, T)] for _ in range(B)]
    return torch.tensor(rows, dtype=torch.int32)


class Setup:
    """Tensors of a case. The tree is drawn from the draft, without replacement."""

    def __init__(self, B: int, T: int, V: int, dtype: torch.dtype, chain: bool) -> None:
        g = torch.Generator().manual_seed(0)
        logits = torch.empty(B, T, V).normal_(0, 5.0, generator=g)
        self.parents = make_parents(B, T, chain)
        self.links = ops.build_tree(self.parents, torch.zeros(B, dtype=torch.int32))[2:]
        # The draft is read at nodes with children only, so only those get a row.
        inner = [(b, i) for b in range(B) for i in range(T) if int(self.links[0][b, i]) >= 0]
        self.draft = torch.empty(len(inner), V)
        self.index = torch.full((B, T), -1, dtype=torch.int32)
        self.tokens = torch.zeros(B, T, dtype=torch.int64)
        self.entropies: list[float] = []
        for r, (b, i) in enumerate(inner):
            logits[b, i] *= 1.0 + torch.rand((), generator=g)  # some nodes are sure, some are not
            self.draft[r] = (logits[b, i] + torch.empty(V).normal_(0, 1.0, generator=g)).softmax(-1)
            self.index[b, i] = r
            children = (self.parents[b] == i).nonzero().flatten()
            self.tokens[b, children] = torch.multinomial(self.draft[r], len(children), generator=g)
            p = logits[b, i].softmax(-1)
            self.entropies.append(float(-(p * p.clamp(min=1e-30).log()).sum()))
        self.logits = logits.to(dtype)
        self.uniforms = torch.rand(B, T, 2, generator=g)

    def accepted_whole(self) -> None:
        """Makes the tokens the argmax and all draws fall on it, so that the walking rules accept a chain to its end."""
        top, token = self.logits.max(-1, keepdim=True)
        self.tokens[:, 1:] = token[:, :-1, 0]
        self.uniforms[..., 0], self.uniforms[..., 1] = 0.0, 0.5
        self.logits.scatter_(-1, token, top + 10)

    def tree(self):
        return self.tokens, *self.links, self.logits

    def ours(self, rule: str):
        drafts = (self.draft, self.index)
        return {
            "A greedy": lambda: ops.verify_greedy(*self.tree()),
            "E each child": lambda: ops.verify_sample(*self.tree(), self.uniforms, "each_child"),
            "F match": lambda: ops.verify_sample(*self.tree(), self.uniforms, "match"),
            "B chain": lambda: ops.verify_chain(*self.tree(), *drafts, self.uniforms),
            "D multi-draft": lambda: ops.verify_multi_draft(*self.tree(), *drafts, self.uniforms, False),
            "G block": lambda: ops.verify_block(*self.tree(), *drafts, self.uniforms),
            "H traversal": lambda: ops.verify_traversal(*self.tree(), *drafts, self.uniforms, False),
        }[rule]

    def eager(self, rule: str):
        """The rule in torch, row by row."""
        choose = {
            "A greedy": eager_greedy,
            "E each child": eager_each_child,
            "F match": eager_match,
            "B chain": eager_multi_draft,
            "D multi-draft": eager_multi_draft,
        }.get(rule)
        if choose is None:
            return lambda: [eager_traversal(self, b) for b in range(len(self.tokens))]
        return lambda: [eager_walk(self, b, choose) for b in range(len(self.tokens))]


def children(setup: Setup, b: int, node: int) -> list[int]:
    found, child = [], int(setup.links[0][b, node])
    while child >= 0:
        found.append(child)
        child = int(setup.links[1][b, child])
    return found


def eager_walk(setup: Setup, b: int, choose):
    node, path = 0, [0]
    while True:
        child, bonus = choose(setup, b, node)
        if child is None:
            return path, bonus
        node = child
        path.append(node)


def with_token(setup: Setup, b: int, node: int, token: int):
    return next((c for c in children(setup, b, node) if int(setup.tokens[b, c]) == token), None), token


def eager_greedy(setup: Setup, b: int, node: int):
    return with_token(setup, b, node, int(setup.logits[b, node].argmax()))


def eager_match(setup: Setup, b: int, node: int):
    return with_token(setup, b, node, int(torch.multinomial(setup.logits[b, node].float().softmax(-1), 1)))


def eager_each_child(setup: Setup, b: int, node: int):
    left = setup.logits[b, node].float().softmax(-1)
    for child in children(setup, b, node):
        token = int(setup.tokens[b, child])
        if float(setup.uniforms[b, child, 0]) < float(left[token]):
            return child, 0
        left[token] = 0
        left = left / left.sum()
    return None, int(torch.multinomial(left, 1))


def eager_multi_draft(setup: Setup, b: int, node: int):
    left = setup.logits[b, node].float().softmax(-1)
    below = children(setup, b, node)
    draft = setup.draft[setup.index[b, node]].clone() if below else None
    for child in below:
        token = int(setup.tokens[b, child])
        if float(setup.uniforms[b, child, 0]) * float(draft[token]) < float(left[token]):
            return child, 0
        left = (left - draft).relu_()
        left /= left.sum()
        draft[token] = 0
        draft /= draft.sum()
    return None, int(torch.multinomial(left, 1))


def eager_traversal(setup: Setup, b: int):
    def visit(node: int, accepted: float):
        below = children(setup, b, node)
        if not below and float(setup.uniforms[b, node, 0]) >= accepted:
            return None
        target = setup.logits[b, node].float().softmax(-1)
        draft = setup.draft[setup.index[b, node]].clone() if below else None
        for child in below:
            token = int(setup.tokens[b, child])
            found = visit(child, min(1.0, accepted * float(target[token]) / float(draft[token])))
            if found is not None:
                return [node, *found[0]], found[1]
            rest = (accepted * target - draft).relu_()
            mass = float(rest.sum())
            target, accepted = rest / mass, mass / (mass + 1 - accepted)
            draft[token] = 0
            draft /= draft.sum()
        if node == 0 or float(setup.uniforms[b, node, 0]) < accepted:
            return [node], int(torch.multinomial(target, 1))
        return None

    return visit(0, 1.0)


STREAM = torch.ones(96 << 20)
WALKS = ["A greedy", "E each child", "F match"]
CASES = [  # name, chain, rules
    ("tree", False, [*WALKS, "D multi-draft", "H traversal"]),
    ("chain", True, ["B chain", "G block"]),
    ("accepted chain", True, WALKS),
]


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    print(f"{'case':16}{'dtype':10}{'rule':16}{'accepted':>9}{'ms':>9}{'x read':>8}{'softmax':>9}{'eager':>8}")
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        for name, chain, rules in CASES:
            setup = Setup(args.rows, args.nodes, args.vocabulary, dtype, chain)
            if name == "accepted chain":
                setup.accepted_whole()
            print(f"{name}: targets' entropy {sum(setup.entropies) / len(setup.entropies):.1f} nats on average")
            read = STREAM[: setup.logits.nbytes // 4]
            for rule in rules:
                runs = [
                    setup.ours(rule),
                    read.sum,
                    lambda s=setup: torch.softmax(s.logits, -1),
                    setup.eager(rule),
                ]
                ours, reading, softmax, eager = facts.interleaved(runs, args.repeats)
                row = {
                    "case": name,
                    "dtype": dtype_name,
                    "rule": rule,
                    "accepted": round(float(setup.ours(rule)()[1].float().mean()) - 1, 2),
                    "ms": round(ours * 1e3, 3),
                    "x_read": round(ours / reading, 3),
                    "softmax_over_ours": round(softmax / ours, 1),
                    "eager_over_ours": round(eager / ours, 1),
                }
                rows.append(row)
                print(
                    f"{name:16}{dtype_name:10}{rule:16}{row['accepted']:9.2f}{row['ms']:9.3f}{row['x_read']:8.3f}"
                    f"{row['softmax_over_ours']:9.1f}{row['eager_over_ours']:8.1f}",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--trees", action="store_true", help="part 2, some minutes")
    parser.add_argument("--contexts", type=int, default=48)
    args = parser.parse_args()
    machine = facts.machine()
    print(facts.record("verify", machine, measure(args)))
    if args.trees:
        print(facts.record("verify-trees", machine, verify_trees.measure(args.contexts)))


if __name__ == "__main__":
    main()
