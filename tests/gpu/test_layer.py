"""rms_norm and apply_rope on CUDA: their definitions, and a row's bits among any others."""

import pytest
import torch

from branchwise.ops.layer import apply_rope_reference, rms_norm_reference
from test_ops_layer import DTYPES, draw, few_differ


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [(0.0, False), (0.0, True), (1.0, True)], ids=str)
@pytest.mark.parametrize("H", [1, 37, 576])
def test_norm_matches_definition(H, form, dtype, device):
    x, weight = draw(2, 5, H, dtype=dtype) * 3, draw(H, dtype=dtype, seed=1)
    out = device.rms_norm(x, weight, 1e-5, *form)
    few_differ(out, rms_norm_reference(x, weight, 1e-5, *form))
    assert torch.equal(device.rms_norm(x.transpose(0, 1), weight, 1e-5, *form), out.transpose(0, 1))
    assert torch.equal(device.rms_norm(x[1, 2], weight, 1e-5, *form), out[1, 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 9, 3, 1, 64), (3, 5, 1, 7, 34)], ids=str)
def test_rope_matches_definition(shape, dtype, device):
    B, Hq, Hkv, T, D = shape
    query, key = (draw(B, T, heads, D, dtype=dtype, seed=heads).transpose(1, 2) for heads in (Hq, Hkv))
    for batch in {1, B}:
        cos, sin = draw(batch, T, D, dtype=dtype, seed=7), draw(batch, T, D, dtype=dtype, seed=8)
        expected = apply_rope_reference(query, key, cos, sin)
        for actual, wanted in zip(device.apply_rope(query, key, cos, sin), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_empty_and_refusals(device):
    assert device.rms_norm(torch.zeros(0, 8), torch.zeros(8), 0.1).shape == (0, 8)
    with pytest.raises(RuntimeError, match="rms_norm: eps must be finite and not negative, got -1"):
        device.rms_norm(torch.zeros(2, 8), torch.zeros(8), -1.0)
    with pytest.raises(RuntimeError, match=r"apply_rope: key.size\(2\) must be that of query = 4"):
        device.apply_rope(torch.zeros(2, 3, 4, 8), torch.zeros(2, 1, 5, 8), *[torch.zeros(1, 4, 8)] * 2)
