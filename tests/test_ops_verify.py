"""The verification ops against their fp64 reference, with the same uniforms."""

from itertools import product

import pytest
import torch

import verify_cases
from branchwise import ops
from branchwise.ops.verify import POLICIES
from verify_cases import CHAINS_ONLY, RULES, compare, pack, random_batch


@pytest.mark.parametrize("rule", RULES)
def test_ten_thousand_random_trees(rule):
    batches = [random_batch(rule, seed) for seed in range(160)]
    assert sum(compare(rule, batch) for batch in batches) < 100  # too close to call, of 10240
    lengths = torch.cat([batch.run(rule)[1] for batch in batches])
    assert (lengths > 1).sum() > 1000 and (lengths == 1).sum() > 1000  # neither always nor never accepted


@pytest.mark.parametrize("rule", RULES)
def test_vocabularies_and_dtypes(rule, isa):
    for V, dtype in product((1, 2, 15, 16, 17, 1023, 1024, 1025, 5000), (torch.float32, torch.bfloat16, torch.float16)):
        for seed in range(2):
            compare(rule, random_batch(rule, seed, B=5, V=V, dtype=dtype, longest=20))


@pytest.mark.parametrize("rule", RULES)
def test_big_trees_and_threads(rule, threads):
    batch = random_batch(rule, 5, B=9, V=2048, longest=300)
    compare(rule, batch)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(batch.run(rule))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_row_alone(rule):
    batch = random_batch(rule, 8, B=6, V=300)
    together = batch.run(rule)
    for b in range(6):
        alone = verify_cases.Batch(
            tuple(x[b : b + 1].contiguous() for x in batch.tree),
            (batch.draft[0], batch.draft[1][b : b + 1]),
            batch.uniforms[b : b + 1],
            [],
        ).run(rule)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))


def one(tokens, parents, p, q=None, uniforms=None, dtype=torch.float32):
    """A single row; p and q are one law for all nodes, uniforms one pair for all."""
    T = len(tokens)
    logits = torch.tensor(p, dtype=torch.float64).log().to(dtype).expand(1, T, -1).contiguous()
    q = torch.tensor(p if q is None else q, dtype=torch.float32).expand(1, T, -1)
    u = torch.tensor(uniforms or [0.0, 0.0], dtype=torch.float32).expand(1, T, 2).contiguous()
    return pack([(tokens, parents)], logits, q, u)


def verdict(batch, rule):
    accepted, count, bonus = batch.run(rule)
    return accepted[0, : count[0]].tolist(), int(bonus[0])


TOP = 1 - 2**-24  # the largest uniform
DRAFTED = ["chain", "with_replacement", "without_replacement", "block", "traversal_with", "traversal_without"]
SAMPLED = ["match", "each_child", "one_coin", *DRAFTED]


@pytest.mark.parametrize("rule", SAMPLED)
def test_zero_probability_is_never_accepted(rule):
    """A coin of exactly 0 (sglang issue 35771), for the child and for the draw."""
    q = [0.5, 0.5, 0.0] if rule in DRAFTED else None
    batch = one([0, 0], [-1, 0], [0.0, 0.5, 0.5], q, [0.0, 0.0])
    path, bonus = verdict(batch, rule)
    assert path == [0] and bonus in (1, 2)


@pytest.mark.parametrize("rule", DRAFTED)
@pytest.mark.parametrize("u", [0.0, 0.5, TOP])
def test_equal_target_and_draft_accept_everything(rule, u):
    p = [0.25, 0.5, 0.25]  # exact in fp32, as are their logarithms' exponentials up to rounding
    path, bonus = verdict(one([0, 1, 2], [-1, 0, 1], p, p, [min(u, 0.999), u]), rule)
    assert path == [0, 1, 2] and p[bonus] > 0


@pytest.mark.parametrize("rule", SAMPLED)
@pytest.mark.parametrize("u", [0.0, 0.5, TOP])
def test_one_hot_target(rule, u):
    q = [0.2, 0.4, 0.4] if rule in DRAFTED else None
    p = [0.0, 1.0, 0.0]
    assert verdict(one([0, 1, 2], [-1, 0, 1], p, q, [u, u]), rule) == ([0, 1], 1)
    assert verdict(one([0, 2], [-1, 0], p, q, [u, u]), rule) == ([0], 1)
    assert verdict(one([0], [-1], p, q, [u, u]), rule) == ([0], 1)


@pytest.mark.parametrize("rule", ["without_replacement", "traversal_without", "with_replacement", "traversal_with"])
def test_rejected_with_no_residual_left(rule):
    """p = q and a coin out of range reject everything: the draw must still have the target's support."""
    for u in (1.0, 2.0):
        path, bonus = verdict(one([0, 1, 2], [-1, 0, 0], [0.0, 0.5, 0.5], None, [u, 0.3]), rule)
        assert path == [0] and bonus in (1, 2)


@pytest.mark.parametrize("rule", ["without_replacement", "traversal_without", "with_replacement", "traversal_with"])
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_many_rejections_of_a_draft_close_to_the_target(rule, distance):
    """Residuals of residuals lose all their digits; what is drawn must still be a token that the target allows."""
    g = torch.Generator().manual_seed(0)
    p = torch.rand(64, generator=g, dtype=torch.float64)
    p[:20] = 0
    q = p * (1 + distance * torch.randn(64, generator=g, dtype=torch.float64))
    tokens = [0, *range(20, 60)]
    for u in (1.0, 0.9999):
        batch = one(tokens, [-1] + [0] * 40, (p / p.sum()).tolist(), (q / q.sum()).tolist(), [1.0, u])
        path, bonus = verdict(batch, rule)
        assert len(path) <= 2 and bonus >= 20


@pytest.mark.parametrize("rule", DRAFTED)
def test_a_child_that_cannot_have_been_drawn_is_passed_over(rule):
    path, bonus = verdict(one([0, 1], [-1, 0], [0.1, 0.8, 0.1], [0.5, 0.0, 0.5], [0.0, 0.5]), rule)
    assert (path, bonus) == ([0], 1)


def test_temperature():
    batch = random_batch("without_replacement", 4, B=32, V=50)
    tokens, child, sibling, logits = batch.tree
    warm = ops.verify_multi_draft(tokens, child, sibling, logits, *batch.draft, batch.uniforms, False, temperature=0.7)
    by_hand = ops.verify_multi_draft(tokens, child, sibling, logits / 0.7, *batch.draft, batch.uniforms, False)
    assert all(torch.equal(a, b) for a, b in zip(warm, by_hand, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_are_not_ready(rule):
    """Making ready what is asked for, and nothing else, ends with the verdict of a tree that is all ready."""
    batch = random_batch(rule, 11, B=20, V=40, longest=12)
    op, reads_draft, _ = RULES[rule]
    ready = torch.zeros(batch.tree[0].shape, dtype=torch.bool)
    hidden = batch.tree[3].clone()
    hidden[:] = torch.nan
    whole = batch.run(rule)
    names = ["greedy", "sample", "chain", "multi_draft", "block", "traversal", "typical", "policy"]
    originals = {name: getattr(ops, f"verify_{name}") for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, original in originals.items():
            patch.setattr(ops, f"verify_{name}", lambda *a, f=original, **k: f(*a, ready=ready, **k))
        tree = (*batch.tree[:3], hidden)
        for _ in range(13):
            result = op(ops, (*tree, *batch.draft) if reads_draft else tree, batch.uniforms)
            missing = torch.nonzero(result[1] == 0).flatten()
            if len(missing) == 0:
                break
            assert not ready[missing, result[2][missing]].any()
            ready[missing, result[2][missing]] = True
            hidden[missing, result[2][missing]] = batch.tree[3][missing, result[2][missing]]
    assert all(torch.equal(a, b) for a, b in zip(whole, result, strict=True))


def test_strided_logits_and_shared_drafts():
    batch = random_batch("without_replacement", 2, B=4, V=33)
    tokens, child, sibling, logits = batch.tree
    wide = torch.full((4, logits.shape[1] * 2, 40), torch.nan)
    wide[:, ::2, :33] = logits
    a = ops.verify_multi_draft(tokens, child, sibling, wide[:, ::2, :33], *batch.draft, batch.uniforms, False)
    assert all(torch.equal(x, y) for x, y in zip(a, batch.run("without_replacement"), strict=True))


def test_refuses():
    batch = one([0, 1, 2], [-1, 0, 0], [0.2, 0.3, 0.5], None, [0.999, 0.5])
    tokens, child, sibling, logits = batch.tree
    draft, index = batch.draft
    u = batch.uniforms
    for rule in CHAINS_ONLY:
        with pytest.raises(RuntimeError, match=r"next_sibling\[0, 1\] = 2 must be -1: this rule takes chains only"):
            batch.run(rule)
    with pytest.raises(RuntimeError, match=r"verify_greedy: next_token\[0, 0\] = 7 must be -1 or a later node"):
        ops.verify_greedy(tokens, child + 6, sibling, logits)
    with pytest.raises(RuntimeError, match=r"tokens\[0, 1\] = 3 must lie between 0 and V - 1 = 2"):
        ops.verify_sample(tokens + 2, child, sibling, logits, u, "each_child")
    with pytest.raises(RuntimeError, match=r"logits.size\(1\) must be T = 3"):
        ops.verify_greedy(tokens, child, sibling, logits[:, :2])
    with pytest.raises(RuntimeError, match=r"tokens must hold at least the root"):
        ops.verify_greedy(tokens[:, :0], child[:, :0].contiguous(), sibling[:, :0].contiguous(), logits[:, :0])
    with pytest.raises(RuntimeError, match=r"uniforms.size\(2\) must be 2"):
        ops.verify_sample(tokens, child, sibling, logits, u[..., :1], "match")
    with pytest.raises(RuntimeError, match=r"temperature must be at least 1e-30, got 0"):
        ops.verify_sample(tokens, child, sibling, logits, u, "match", temperature=0.0)
    with pytest.raises(RuntimeError, match=r"threshold_single must lie in \(0, 1\], got 1.5"):
        ops.verify_sample(tokens, child, sibling, logits, u, "one_coin", threshold_single=1.5)
    with pytest.raises(ValueError, match=r"thresholds need rule 'one_coin', got 'match'"):
        ops.verify_sample(tokens, child, sibling, logits, u, "match", threshold_single=0.5)
    with pytest.raises(ValueError, match=r"rule must be one of each_child, one_coin, match, got 'best'"):
        ops.verify_sample(tokens, child, sibling, logits, u, "best")
    with pytest.raises(ValueError, match=rf"policy must be one of {', '.join(POLICIES)}, got 'trust'"):
        ops.verify_policy(tokens, child, sibling, logits, u, "trust")
    with pytest.raises(RuntimeError, match=r"top_k must be at least 1, got 0"):
        ops.verify_policy(tokens, child, sibling, logits, u, "probability_floor", top_k=0)
    with pytest.raises(RuntimeError, match=r"draft_index\[0, 0\] = 9 must name a row of draft, below R = 3"):
        ops.verify_multi_draft(tokens, child, sibling, logits, draft, index + 9, u, False)
    with pytest.raises(RuntimeError, match=r"draft\[0\] must be probabilities that sum to 1, got a sum of 2"):
        ops.verify_multi_draft(tokens, child, sibling, logits, draft * 2, index, u, False)
    with pytest.raises(RuntimeError, match=r"logits\[0, 0\] must hold something above -inf, and neither NaN nor \+inf"):
        ops.verify_sample(tokens, child, sibling, logits * torch.nan, u, "match")
    with pytest.raises(RuntimeError, match=r"logits\[0, 0\] must hold something above -inf"):
        ops.verify_sample(tokens, child, sibling, torch.full_like(logits, -torch.inf), u, "match")


@pytest.mark.parametrize("value", [-1.0, 1.0, 5.0, torch.nan, torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_uniforms_out_of_range_do_no_harm(rule, value):
    batch = random_batch(rule, 6, B=8, V=1500)
    batch.uniforms.fill_(value)
    accepted, count, bonus = batch.run(rule)
    assert (count >= 1).all() and (bonus >= 0).all() and (bonus < 1500).all() and (accepted[:, 0] == 0).all()


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(1, 1, 3000)
    logits[0, 0, [1500, 2900]] = 2.0
    one_node = torch.zeros(1, 1, dtype=torch.int64), *(torch.full((1, 1), -1, dtype=torch.int32),) * 2
    assert int(ops.verify_greedy(*one_node, logits)[2]) == 1500


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule):
    batch = random_batch(rule, 3, B=2, V=9)
    calls = []
    name = {"greedy": "greedy", "chain": "chain", "block": "block", "typical": "typical"}.get(rule)
    name = name or ("traversal" if "traversal" in rule else "multi_draft" if "replacement" in rule else None)
    name = name or ("sample" if rule in ("match", "each_child", "one_coin", "thresholds") else "policy")
    op = getattr(torch.ops.branchwise, f"verify_{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.branchwise, f"verify_{name}", lambda *a: calls.append(a) or op(*a))
        batch.run(rule)
    torch.library.opcheck(op.default, calls[0])


def noise(seed=0, row=0, round=0, node=0, purpose=0):
    as_i64 = lambda x: torch.tensor([x if x < 1 << 63 else x - (1 << 64)])  # noqa: E731
    return ops.node_uniforms(as_i64(seed), as_i64(row), as_i64(round)[None], as_i64(node)[None], purpose)[0, 0]


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # known answers of Random123 (kat_vectors, philox4x32 10)
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E)),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xD16CFE09, 0x94FDCCEB)),
    ],
)
def test_philox(key, counter, words):
    assert noise(key, *counter).tolist() == [(word >> 8) / 2**24 for word in words]


def test_noise_depends_on_all_its_arguments():
    base = dict(seed=3, row=4, round=5, node=6, purpose=7)
    seen = {tuple(noise(**base).tolist())}
    for name in base:
        seen.add(tuple(noise(**{**base, name: 9}).tolist()))
    seen.add(tuple(noise(**{**base, "seed": 3 + 2**40}).tolist()))
    assert len(seen) == 7 and noise(**base).tolist() == noise(**base).tolist()
    B, N = 50, 400
    rows, rounds = torch.arange(B), torch.zeros(B, N).long()
    u = ops.node_uniforms(rows, rows, rounds, torch.arange(N).expand(B, N).contiguous(), 1)
    counts, expected = torch.histc(u, 20, 0, 1), u.numel() / 20
    assert u.min() >= 0 and u.max() < 1 and ((counts - expected) ** 2 / expected).sum() < 50
    with pytest.raises(RuntimeError, match=r"nodes.size\(1\) must be N = 400"):
        ops.node_uniforms(rows, rows, rounds, rounds[:, :5].contiguous(), 0)
    torch.library.opcheck(torch.ops.branchwise.node_uniforms.default, (rows, rows, rounds, rounds, 0))
