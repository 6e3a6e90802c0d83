"""confidence, draft_blocks and verify_blocks against their definitions."""

import math

import pytest
import torch

from branchwise import ops
from branchwise.ops.diffusion import (
    SCORES,
    confidence_reference,
    draft_blocks_reference,
    verify_blocks_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = 7


def odd_logits(V, dtype):
    """[9, V], with ties, infinities and NaN."""
    g = torch.Generator().manual_seed(V)
    logits = (torch.randn(9, V, generator=g) * 4).to(dtype)
    logits[0] = 0.0  # all equal
    logits[1, V // 2 :] = -math.inf
    logits[2] = -math.inf
    if V > 3:
        logits[3, [1, 3]] = 30.0  # a tie at the top
        logits[4, 2] = math.nan
        logits[5, 2] = math.inf
    return logits


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("V", [1, 2, 5, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_confidence(dtype, V, score, isa):
    logits = odd_logits(V, dtype)
    for exclude in (None, torch.tensor([0]), torch.tensor([V - 1, 1, V, -3, 1])):
        tokens, scores = ops.confidence(logits, exclude, score=score)
        inside = None if exclude is None else exclude[(exclude >= 0) & (exclude < V)]
        wanted, exact = confidence_reference(logits, inside, score=score)
        assert torch.equal(tokens, wanted)
        torch.testing.assert_close(scores.double(), exact, atol=3e-6, rtol=1e-5)


def test_confidence_is_the_same_for_any_thread_count_and_batch(threads):
    logits = torch.randn(64, 3000)
    whole = ops.confidence(logits)
    threads(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, ops.confidence(logits), strict=True))
    for r in (0, 13, 63):
        alone = ops.confidence(logits[r : r + 1])
        assert alone[0] == whole[0][r] and alone[1] == whole[1][r]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_drawn_tokens_follow_the_softmax(temperature):
    """Chi-square over 60,000 keys; the mask is never drawn, and the score is the untempered probability."""
    logits, n = torch.tensor([[1.0, 0.2, -0.5, 2.0, 0.0, -math.inf, 1.5]]), 60_000
    exclude = torch.tensor([3])
    keys = torch.arange(n) * 7919 - 5
    tokens, scores = ops.confidence(logits.expand(n, -1).contiguous(), exclude, temperature, keys)
    again, _ = ops.confidence(logits.expand(n, -1).contiguous(), exclude, temperature, keys)
    assert torch.equal(tokens, again)
    allowed = logits[0].double().index_fill(0, exclude, -math.inf)
    p = (allowed / temperature).softmax(0)
    seen = torch.bincount(tokens, minlength=7)
    assert int(seen[3]) == int(seen[5]) == 0
    here = p > 0
    chi = float(((seen[here] - n * p[here]) ** 2 / (n * p[here])).sum())
    assert chi < 24  # five categories, four degrees of freedom: 1e-4
    torch.testing.assert_close(scores.double(), allowed.softmax(0)[tokens], atol=1e-6, rtol=1e-5)


def test_large_vocabularies_draw_over_all_blocks():
    n, V = 4000, 5000
    logits = torch.zeros(n, V)
    tokens, _ = ops.confidence(logits, None, 1.0, torch.arange(n))
    counts = torch.histc(tokens.float(), 10, 0, V)
    assert ((counts - n / 10).abs() < 5 * math.sqrt(n / 10)).all()


def random_windows(rows, W, g, block):
    window = torch.randint(8, 20, (rows, W), generator=g)
    masks = torch.rand(rows, W, generator=g) < torch.rand(rows, 1, generator=g)
    window = torch.where(masks, MASK, window)
    tokens = torch.randint(8, 20, (rows, W), generator=g)
    scores = (torch.rand(rows, W, generator=g) * 4).round() / 4  # with ties
    scores[torch.rand(rows, W, generator=g) < 0.02] = -math.inf
    origins = torch.randint(-block, W, (rows,), generator=g, dtype=torch.int32)
    return window, tokens, scores, origins


@pytest.mark.parametrize("rule, level", [("count", 0.0), ("threshold", 0.6), ("budget", 0.9)])
@pytest.mark.parametrize("block", [1, 4, 5, 100])
def test_draft_and_verify(block, rule, level):
    g = torch.Generator().manual_seed(block)
    for W, K in ((1, 1), (8, 3), (17, 9)):
        window, tokens, scores, origins = random_windows(60, W, g, block)
        if rule == "budget":
            scores = scores - 1  # negative entropies
        counts = torch.randint(0, 4, (60, K + 1), generator=g, dtype=torch.int32)
        args = (origins, counts, MASK, block, rule, level)
        drafts, num = ops.draft_blocks(window, tokens, scores, *args)
        wanted, wanted_num = draft_blocks_reference(window, tokens, scores, *args)
        assert torch.equal(drafts, wanted) and torch.equal(num, wanted_num)
        # Predictions at the drafts: mostly those that they were made from.
        there = tokens[:, None].repeat(1, K, 1)
        sure = scores[:, None].repeat(1, K, 1)
        changed = torch.rand(60, K, W, generator=g) < 0.05
        there, sure = torch.where(changed, there + 1, there), torch.where(changed, sure / 2, sure)
        got = ops.verify_blocks(drafts, num, there, sure, *args)
        assert torch.equal(got, verify_blocks_reference(drafts, num, there, sure, *args))
        if W == 17 and block > 1:
            assert len(set(got.tolist())) > 3


def bad_calls():
    logits, window = torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int64)
    scores, origins = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32)
    counts = torch.ones(2, 3, dtype=torch.int32)
    yield "logits must have shape", lambda: ops.confidence(logits[0])
    yield "logits must be float32", lambda: ops.confidence(logits.double())
    yield "temperature must be 0", lambda: ops.confidence(logits, None, -1.0)
    yield "temperature = 1 needs keys", lambda: ops.confidence(logits, None, 1.0)
    yield r"keys.size\(0\) must be R = 2", lambda: ops.confidence(logits, None, 1.0, torch.arange(3))
    yield "exclude must be int64", lambda: ops.confidence(logits, origins)
    yield "block_size must be at least 1", lambda: ops.draft_blocks(window, window, scores, origins, counts, 0, 0)
    yield (
        "for at least one draft",
        lambda: ops.draft_blocks(window, window, scores, origins, counts[:, :1].clone(), 0, 1),
    )
    yield r"scores must be float32", lambda: ops.draft_blocks(window, window, window, origins, counts, 0, 1)
    drafts, num = window[:, None].expand(-1, 2, -1).contiguous(), torch.tensor([1, 3], dtype=torch.int32)
    three = scores[:, None].expand(-1, 2, -1).contiguous()
    yield r"num_drafts\[1\] = 3 must", lambda: ops.verify_blocks(drafts, num, drafts, three, origins, counts, 0, 1)
    yield (
        r"counts.size\(1\) must be K \+ 1 = 3",
        lambda: ops.verify_blocks(drafts, num, drafts, three, origins, counts[:, :2].contiguous(), 0, 1),
    )


@pytest.mark.parametrize("message, call", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_refuses_unknown_names():
    with pytest.raises(ValueError, match="score must be one of probability, margin, entropy, got 'luck'"):
        ops.confidence(torch.zeros(1, 2), score="luck")
    with pytest.raises(ValueError, match="rule must be one of count, threshold, budget, got 'luck'"):
        window, counts = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int32)
        ops.draft_blocks(window, window, torch.zeros(1, 2), counts[:, 0].clone(), counts, 0, 1, "luck")


def test_opcheck():
    g = torch.Generator().manual_seed(0)
    window, tokens, scores, origins = random_windows(3, 6, g, 2)
    counts = torch.ones(3, 3, dtype=torch.int32)
    check, branchwise = torch.library.opcheck, torch.ops.branchwise
    check(branchwise.confidence, (torch.randn(3, 9), torch.tensor([2]), 1.0, torch.arange(3), 1))
    check(branchwise.draft_blocks, (window, tokens, scores, origins, counts, MASK, 2, 1, 0.5))
    drafts, num = ops.draft_blocks(window, tokens, scores, origins, counts, MASK, 2)
    check(branchwise.verify_blocks, (drafts, num, drafts, scores[:, None].repeat(1, 2, 1), origins, counts, MASK, 2))
