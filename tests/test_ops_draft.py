"""top_tokens against a full sort."""

import pytest
import torch

from branchwise import ops
from branchwise.ops.draft import top_tokens_reference


def equal(logits, k, exclude=None):
    tokens, log_probs = ops.top_tokens(logits, k, exclude)
    expected, expected_log_probs = top_tokens_reference(logits, k, exclude)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(log_probs.double(), expected_log_probs, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [1, 7, 128, 1023, 1024, 1025, 3000, 49152])
def test_matches_definition(V, dtype, isa):
    g = torch.Generator().manual_seed(V)
    logits = (torch.randn(3, 2, V, generator=g) * 4).to(dtype)  # ties abound in half precision
    for k in (1, 8, 40):
        equal(logits, k)
    equal(logits, 3, torch.tensor([0, V - 1]))
    equal(logits[:, :1], 5)
    equal(torch.randint(0, 3, (2, V), generator=g).to(dtype), 9)  # nothing but ties


def test_infinities_and_nan(isa):
    logits = torch.randn(6, 2000)
    logits[0] = -torch.inf
    logits[1, 5:] = -torch.inf
    logits[2, 3] = torch.nan
    logits[3, 7] = torch.inf
    logits[4] = 0.0
    logits[5] = torch.nan
    equal(logits, 8)
    equal(logits[1:2], 8, torch.tensor([0, 1, 2, 1999]))


def test_a_nan_hides_no_other_token(isa):
    logits = torch.randn(8, 5000)
    for row in range(8):  # behind the largest, in the same lanes of later vectors
        logits[row, 64 + row], logits[row, 128 + row :: 64] = 50.0, torch.nan
    equal(logits, 5)


def test_empty_and_strided():
    assert ops.top_tokens(torch.zeros(0, 50), 3)[0].shape == (0, 3)
    assert ops.top_tokens(torch.zeros(2, 0), 3)[0].tolist() == [[-1] * 3] * 2
    equal(torch.randn(9, 4000)[::3], 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.top_tokens(torch.zeros(2, 9), 0), "k must be at least 1, got 0"),
        (lambda: ops.top_tokens(torch.zeros(2, 9).double(), 1), "logits must be float32"),
        (lambda: ops.top_tokens(torch.zeros(9, 2).mT, 1), "logits must be contiguous in its last"),
        (lambda: ops.top_tokens(torch.zeros(2, 9), 1, torch.tensor([1.0])), "exclude must be int64"),
        (lambda: ops.top_tokens(torch.zeros(2, 9, requires_grad=True), 1), "no gradient"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_opcheck():
    torch.library.opcheck(torch.ops.branchwise.top_tokens, (torch.randn(3, 50), 4, torch.tensor([1])))
