"""The acceptance rules on CUDA: random trees against the fp64 reference, with the CPU ops' cases."""

from itertools import product

import pytest
import torch

from branchwise import ops
from verify_cases import RULES, Batch, compare, random_batch


@pytest.mark.parametrize("rule", RULES)
def test_random_trees(rule, device):
    batches = [random_batch(rule, seed, B=16) for seed in range(6 if device.emulated else 160)]
    close = sum(compare(rule, batch, device) for batch in batches)
    assert close < 0.02 * sum(len(batch.trees) for batch in batches)


@pytest.mark.parametrize("rule", RULES)
def test_vocabularies_and_dtypes(rule, device):
    sizes = (1, 9, 255, 1025, 5001) if device.emulated else (1, 9, 255, 256, 257, 5001, 32000, 152064, 300_001)
    for V, dtype in product(sizes, (torch.float32, torch.bfloat16, torch.float16)):
        compare(rule, random_batch(rule, 1 + V % 2, B=2, V=V, dtype=dtype, longest=12), device)


@pytest.mark.parametrize("rule", ["match", "traversal_without"])
def test_more_tokens_than_chunks_of_one_round(rule, device):
    compare(rule, random_batch(rule, 2, B=1, V=270_000, longest=4), device)


@pytest.mark.parametrize("rule", ["greedy", "match", "traversal_without"])
def test_big_tree(rule, device):
    compare(rule, random_batch(rule, 5, B=2, V=300, longest=150), device)


@pytest.mark.parametrize("rule", ["greedy", "each_child", "traversal_with"])
def test_a_row_alone(rule, device):
    batch = random_batch(rule, 8, B=4, V=300)
    together = batch.run(rule, device)
    for b in range(4):
        alone = Batch(
            tuple(x[b : b + 1].contiguous() for x in batch.tree),
            (batch.draft[0], batch.draft[1][b : b + 1]),
            batch.uniforms[b : b + 1],
            [],
        ).run(rule, device)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("rule", ["greedy", "match", "traversal_with", "typical"])
def test_nodes_that_are_not_ready(rule, device):
    """The same verdicts as on the CPU, which names the node that it wanted."""
    for seed in range(3):
        batch = random_batch(rule, seed, B=8, V=50)
        ready = torch.rand(batch.tree[0].shape, generator=torch.Generator().manual_seed(seed)) < 0.6

        class Ready:
            def __init__(self, on):
                self.on = on

            def __getattr__(self, op):
                return lambda *args: getattr(self.on, op)(*args, ready=ready)  # noqa: B023

        for actual, expected in zip(batch.run(rule, Ready(device)), batch.run(rule, Ready(ops)), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_distribution(bad, device):
    """On the CPU an exception; here, where nobody waits for the result, a row that accepts nothing."""
    batch = random_batch("match", 1, B=3, V=40)
    batch.tree[3][1, 0, 7] = bad
    accepted, count, bonus = batch.run("match", device)
    assert count[1] == 0 and bonus[1] == -1 and (accepted[1] == -1).all()
    assert (count[[0, 2]] > 0).all() and (bonus[[0, 2]] >= 0).all()


def test_draws_from_more_tokens_than_a_block_holds(device):
    batch = random_batch("greedy", 1, B=1, V=20_000, longest=2)
    options = {"threshold": 0.1, "top_k": 15_000}
    with pytest.raises(RuntimeError, match=r"verify_policy: T = \d+ nodes and top_k = 15000 need .* shared memory"):
        device.verify_policy(*batch.tree, batch.uniforms, "probability_floor", **options)


def test_links_and_tokens_that_lead_nowhere(device):
    batch = random_batch("match", 4, B=2, V=40)
    tokens, child, sibling, _ = batch.tree
    child[0, 0], sibling[1, :] = 10**6, -7
    tokens[1, 1:] = 10**9
    for rule in ("greedy", "each_child", "match", "traversal_with"):
        _, count, bonus = batch.run(rule, device)
        assert (count == 1).all() and ((bonus >= 0) & (bonus < 40)).all()
