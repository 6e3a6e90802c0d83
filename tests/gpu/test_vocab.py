"""What drafters and masked-diffusion decoders ask of logits, on CUDA: the CPU ops are the oracle."""

import pytest
import torch

from branchwise import ops
from branchwise.ops.diffusion import SCORES
from test_ops_diffusion import MASK, odd_logits, random_windows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same_tokens(device, logits, k, exclude=None):
    tokens, log_probs = device.top_tokens(logits, k, exclude)
    expected, expected_log_probs = ops.top_tokens(logits, k, exclude)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 7, 1023, 5000])
def test_top_tokens(V, dtype, device):
    g = torch.Generator().manual_seed(V)
    logits = (torch.randn(3, V, generator=g) * 4).to(dtype)  # ties abound in half precision
    for k in (1, 8, 40):
        same_tokens(device, logits, k)
    same_tokens(device, logits, 3, torch.tensor([V - 1, 0, -5, V]))
    same_tokens(device, torch.randint(0, 3, (2, V), generator=g).to(dtype), 9)  # nothing but ties
    same_tokens(device, torch.randn(9, V, generator=g).to(dtype)[::3], 4)


def test_top_tokens_of_large_vocabularies(device):
    logits = torch.randn(2, 152_064, generator=torch.Generator().manual_seed(1)).bfloat16()
    same_tokens(device, logits, 10)
    same_tokens(device, logits, 1500, torch.arange(100))


def test_top_tokens_of_infinities_and_nan(device):
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(1))
    logits[0] = -torch.inf
    logits[1, 5:] = -torch.inf
    logits[2, 3] = torch.nan
    logits[3, 7] = torch.inf
    logits[4] = 0.0
    logits[4, 1000] = -0.0
    logits[5] = torch.nan
    same_tokens(device, logits, 8)
    same_tokens(device, logits[1:2], 8, torch.tensor([0, 1, 2, 1999]))
    assert device.top_tokens(torch.zeros(0, 50), 3)[0].shape == (0, 3)
    assert device.top_tokens(torch.zeros(2, 0), 3)[0].tolist() == [[-1] * 3] * 2


def test_more_top_tokens_than_a_block_holds(device):
    with pytest.raises(RuntimeError, match=r"top_tokens: k = 30000 needs .* bytes of a block's shared memory"):
        device.top_tokens(torch.zeros(1, 40_000), 30_000)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("V", [1, 2, 5, 1025, 5000])
def test_confidence(V, score, device):
    for dtype in DTYPES:
        logits = odd_logits(V, dtype)
        for exclude in (None, torch.tensor([V - 1, 1, V, -3, 1])):
            for drawn in ({}, {"temperature": 0.8, "keys": torch.arange(9) * 77 - 300}):
                actual = device.confidence(logits, exclude, score=score, **drawn)
                expected = ops.confidence(logits, exclude, score=score, **drawn)
                assert torch.equal(actual[0], expected[0])
                torch.testing.assert_close(actual[1], expected[1], atol=3e-6, rtol=1e-5)


def test_rows_alone(device):
    """Bit-equal, whatever else is in the batch."""
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2)).bfloat16()
    keys = torch.arange(5)
    whole = device.confidence(logits, None, 1.0, keys), device.top_tokens(logits, 5)
    for r in range(5):
        rows = logits[r : r + 1]
        alone = device.confidence(rows, None, 1.0, keys[r : r + 1]), device.top_tokens(rows, 5)
        for ours, theirs in zip(whole, alone, strict=True):
            assert all(torch.equal(a[r : r + 1], b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rule, level", [("count", 0.0), ("threshold", 0.6), ("budget", 0.9)])
@pytest.mark.parametrize("block", [1, 5, 100])
def test_steps_of_blocks(block, rule, level, device):
    g = torch.Generator().manual_seed(block)
    for W, K in ((1, 1), (8, 3), (200, 5)):
        rows = 30
        window, tokens, scores, origins = random_windows(rows, W, g, block)
        if rule == "budget":
            scores = scores - 1  # negative entropies
        counts = torch.randint(0, 4, (rows, K + 1), generator=g, dtype=torch.int32)
        args = (origins, counts, MASK, block, rule, level)
        drafts, num = device.draft_blocks(window, tokens, scores, *args)
        wanted, wanted_num = ops.draft_blocks(window, tokens, scores, *args)
        assert torch.equal(drafts, wanted) and torch.equal(num, wanted_num)
        there, sure = tokens[:, None].repeat(1, K, 1), scores[:, None].repeat(1, K, 1)
        changed = torch.rand(rows, K, W, generator=g) < 0.02
        there, sure = torch.where(changed, there + 1, there), torch.where(changed, sure / 2, sure)
        got = device.verify_blocks(drafts, num, there, sure, *args)
        assert torch.equal(got, ops.verify_blocks(drafts, num, there, sure, *args))
        if W == 200:
            assert len(set(got.tolist())) > 1


def test_numbers_of_drafts_outside(device):
    """Bounded, as they cannot be refused."""
    window = torch.full((3, 4), MASK)
    tokens, scores = torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4)
    origins, counts = torch.zeros(3, dtype=torch.int32), torch.ones(3, 3, dtype=torch.int32)
    args = (origins, counts, MASK, 4)
    drafts, _ = device.draft_blocks(window, tokens, scores, *args)
    spread = [x[:, None].repeat(1, 2, 1) for x in (tokens, scores)]
    num = torch.tensor([-7, 2, 999], dtype=torch.int32)
    assert device.verify_blocks(drafts, num, *spread, *args).tolist() == [-1, 1, 1]


@pytest.mark.parametrize(
    "message, call",
    [
        ("k must be at least 1", lambda on: on.top_tokens(torch.zeros(2, 9), 0)),
        ("exclude must be int64", lambda on: on.confidence(torch.zeros(2, 9), torch.zeros(1))),
        ("temperature = 1 needs keys", lambda on: on.confidence(torch.zeros(2, 9), None, 1.0)),
        (
            r"windows of W = 20000 tokens need .* bytes of a block's shared memory",
            lambda on: on.draft_blocks(
                torch.zeros(1, 20_000, dtype=torch.int64),
                torch.zeros(1, 20_000, dtype=torch.int64),
                torch.zeros(1, 20_000),
                torch.zeros(1, dtype=torch.int32),
                torch.ones(1, 2, dtype=torch.int32),
                0,
                1,
            ),
        ),
    ],
)
def test_refuses(message, call, device):
    with pytest.raises(RuntimeError, match=message):
        call(device)
