"""invariant_linear against fp64, and a row's bits among any others."""

import sys

import pytest
import torch

from branchwise import layers, ops
from branchwise.ops.linear import linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: (K, N): of models; tails of vectors, tiles and blocks; a single value.
SIZES = [(576, 192), (64, 48), (100, 37), (33, 16), (257, 130), (31, 1), (1, 5)]
ROWS = (1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 32, 33, 48, 64, 100, 257, 300)


def layer(K, N, rows, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(dtype) for shape in ((rows, K), (N, K), (N,))]


def check(out, x, weight, bias=None):
    """Every product rounded, every sum rounded, in any order; then the result."""
    expected = linear_reference(x, weight, bias)
    terms = linear_reference(x.abs(), weight.abs(), None if bias is None else bias.abs())
    allowed = ROUNDING[x.dtype] * 1.01 * expected.abs() + (x.shape[-1] + 1) * 2.0**-24 * terms + 1e-38
    assert out.dtype == x.dtype and out.shape == expected.shape
    assert bool(((out.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, N", SIZES)
def test_matches_definition(K, N, dtype, isa):
    x, weight, bias = layer(K, N, 37, dtype)
    check(ops.invariant_linear(x, weight, bias), x, weight, bias)
    check(ops.invariant_linear(x[0], weight), x[0], weight)
    check(ops.invariant_linear(x[:12].view(3, 2, 2, K), weight), x[:12].view(3, 2, 2, K), weight)
    check(ops.invariant_linear(x[::2, None], weight, bias), x[::2, None], weight, bias)
    wide = torch.cat([weight, weight.flip(1)], 1)  # rows that lie apart
    check(ops.invariant_linear(x, wide[:, K:], bias), x, weight.flip(1), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, N", SIZES)
def test_a_row_has_its_bits_among_any_others(K, N, dtype, isa):
    x, weight, bias = layer(K, N, 300, dtype)
    whole = ops.invariant_linear(x, weight, bias)
    for n in ROWS:
        assert torch.equal(ops.invariant_linear(x[:n], weight, bias), whole[:n])
        assert torch.equal(ops.invariant_linear(x[-n:], weight, bias), whole[-n:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_products_on_any_number_of_threads(dtype, isa, threads):
    """Several chunks of rows, several stretches of K."""
    x, weight, bias = layer(3300, 130, 530, dtype)
    whole = ops.invariant_linear(x, weight, bias)
    check(whole, x, weight, bias)
    for n in (1, 2, 5):
        threads(n)
        assert torch.equal(ops.invariant_linear(x, weight, bias), whole)
        for rows in (1, 16, 40, 260):
            assert torch.equal(ops.invariant_linear(x[:rows], weight, bias), whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [21, 37])
def test_nothing_behind_the_tensors_is_read(rows, dtype, isa):
    """What lies behind rows and columns is NaN, and a NaN of a row stays in it."""
    K, N = 45, 19
    x, weight, bias = layer(K, N, rows, dtype)

    def framed(t):
        room = torch.full([size + 40 for size in t.shape], torch.nan, dtype=dtype)
        room[tuple(slice(0, size) for size in t.shape)] = t
        return room[tuple(slice(0, size) for size in t.shape)]

    weights, biases = framed(weight), framed(bias)
    check(ops.invariant_linear(x, weights, biases), x, weight, bias)
    x[4, 3] = torch.nan
    x[7, 1] = torch.inf
    out = ops.invariant_linear(x, weights, biases)
    assert bool(out[4].isnan().all()) and not bool(out[7].isfinite().any())
    rest = [r for r in range(rows) if r not in (4, 7)]
    check(out[rest], x[rest], weight, bias)


def test_torch_changes_a_rows_bits():
    """What the op is for: in fp32, torch computes a row alone in another order than among others."""
    x, weight, _ = layer(576, 1536, 64, torch.float32)
    whole = torch.nn.functional.linear(x, weight)
    assert any(not torch.equal(torch.nn.functional.linear(x[:n], weight), whole[:n]) for n in (1, 2, 3))


def test_opcheck():
    for dtype in DTYPES:
        x, weight, bias = layer(20, 7, 6, dtype)
        torch.library.opcheck(torch.ops.branchwise.invariant_linear, (x.view(2, 3, 20), weight, bias))
        torch.library.opcheck(torch.ops.branchwise.invariant_linear, (x[0], weight))


def test_empty():
    assert ops.invariant_linear(torch.zeros(0, 8), torch.zeros(3, 8)).shape == (0, 3)
    assert ops.invariant_linear(torch.zeros(2, 8), torch.zeros(0, 8)).shape == (2, 0)


@pytest.mark.parametrize(
    "x, weight, bias, message",
    [
        (torch.zeros(()), torch.zeros(3, 8), None, r"x must have shape \[..., K\], got a scalar"),
        (torch.zeros(2, 0), torch.zeros(3, 0), None, r"x.size\(-1\) must be at least 1, got shape \[2, 0\]"),
        (torch.zeros(2, 8).double(), torch.zeros(3, 8), None, "x must be float32, bfloat16 or float16, got float64"),
        (torch.zeros(2, 8), torch.zeros(8), None, r"weight must have shape \[N, K\], got \[8\]"),
        (torch.zeros(2, 8), torch.zeros(3, 9), None, r"weight.size\(1\) must be x.size\(-1\) = 8, got shape \[3, 9\]"),
        (torch.zeros(2, 8), torch.zeros(3, 8).half(), None, "weight must be float32, got float16"),
        (torch.zeros(2, 8), torch.zeros(8, 3).mT, None, "weight must be contiguous in its last dimension"),
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(4), r"bias.size\(0\) must be weight.size\(0\) = 3"),
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(3).half(), "bias must be float32, got float16"),
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(6)[::2], "bias must be contiguous"),
        (torch.zeros(2, 8), torch.zeros(3, 8, requires_grad=True), None, "is for inference and has no gradient"),
    ],
)
def test_refusals(x, weight, bias, message):
    with pytest.raises(RuntimeError, match=f"invariant_linear.*{message}"):
        ops.invariant_linear(x, weight, bias)


@pytest.mark.parametrize("amd", [False, True])
def test_faster_rows(amd, isa, monkeypatch):
    monkeypatch.setattr(layers, "_mkl_on_amd", lambda: amd)
    rows = {"baseline": range(0), "avx2": range(1, 129) if amd else range(4, 25)}
    assert layers.faster_rows() == rows.get(isa, range(1, sys.maxsize) if amd else range(4, 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 24, 25])
def test_modules_run_as_our_op_where_it_is_faster(rows, dtype, monkeypatch):
    monkeypatch.setattr(layers, "faster_rows", lambda: range(4, 25))

    def counted(*args):
        calls.append(args)
        return op(*args)

    calls, op = [], ops.invariant_linear
    monkeypatch.setattr(layers.ops, "invariant_linear", counted)
    x, weight, bias = layer(32, 8, rows, dtype)
    model = torch.nn.Sequential(torch.nn.Linear(32, 8, dtype=dtype))
    model[0].weight.data, model[0].bias.data = weight, bias
    with torch.no_grad():
        for where_faster, ours in [(True, dtype != torch.float32 or 4 <= rows <= 24), (False, True)]:
            with layers.InvariantLinears(model, where_faster):
                check(model(x.view(1, rows, 32)), x.view(1, rows, 32), weight, bias)
            assert len(calls) == ours
            calls.clear()
        model(x)
    assert not calls
