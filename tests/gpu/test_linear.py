"""invariant_linear on CUDA: its definition, and a row's bits among any others."""

import pytest
import torch

from test_ops_linear import DTYPES, ROWS, SIZES, check, layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, N", [*SIZES, (72, 40), (1000, 130)])
def test_matches_definition(K, N, dtype, device):
    x, weight, bias = layer(K, N, 37, dtype)
    check(device.invariant_linear(x, weight, bias), x, weight, bias)
    check(device.invariant_linear(x[0], weight), x[0], weight)
    check(device.invariant_linear(x[:12].view(3, 2, 2, K), weight), x[:12].view(3, 2, 2, K), weight)
    check(device.invariant_linear(x[::2, None], weight, bias), x[::2, None], weight, bias)
    wide = torch.cat([weight, weight.flip(1)], 1)  # rows that lie apart
    check(device.invariant_linear(x, wide[:, K:], bias), x, weight.flip(1), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, N", [(576, 192), (257, 130), (72, 40)])
def test_a_row_has_its_bits_among_any_others(K, N, dtype, device):
    x, weight, bias = layer(K, N, 300, dtype)
    whole = device.invariant_linear(x, weight, bias)
    for n in ROWS[::2]:
        assert torch.equal(device.invariant_linear(x[:n], weight, bias), whole[:n])
        assert torch.equal(device.invariant_linear(x[-n:], weight, bias), whole[-n:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_rows_bits_wherever_it_lies(dtype, device):
    x, weight, _ = layer(64, 48, 9, dtype)
    whole = device.invariant_linear(x, weight)
    room = torch.empty(x.numel() + 8, dtype=dtype)
    for offset in range(4):
        moved = room[offset : offset + x.numel()].view_as(x).copy_(x)
        assert torch.equal(device.invariant_linear(moved, weight), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, N", [(45, 19), (72, 40)])
def test_nothing_behind_the_tensors_is_read(K, N, dtype, device):
    """A NaN of a row stays in it; the sanitizers, and the emulator's shared memory of NaNs, see the rest."""
    x, weight, bias = layer(K, N, 21, dtype)
    x[4, 3] = torch.nan
    x[7, 1] = torch.inf
    out = device.invariant_linear(x, weight, bias)
    assert bool(out[4].isnan().all()) and not bool(out[7].isfinite().any())
    rest = [r for r in range(21) if r not in (4, 7)]
    check(out[rest], x[rest], weight, bias)


def test_empty(device):
    assert device.invariant_linear(torch.zeros(0, 8), torch.zeros(3, 8)).shape == (0, 3)
    assert device.invariant_linear(torch.zeros(2, 8), torch.zeros(0, 8)).shape == (2, 0)


def test_refusals_name_argument_and_value(device):
    with pytest.raises(RuntimeError, match=r"weight.size\(1\) must be x.size\(-1\) = 8, got shape \[3, 9\]"):
        device.invariant_linear(torch.zeros(2, 8), torch.zeros(3, 9))
