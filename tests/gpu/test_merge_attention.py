"""CUDA ops against the CPU oracle; skipped without a device."""

import pytest
import torch

from branchwise import ops

pytestmark = pytest.mark.skipif(
    not (ops.CUDA_LOADED and torch.cuda.is_available()), reason="needs a CUDA device and libbranchwise_cuda"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (3, 9, 17, 64), (2, 32, 64, 128), (1, 2, 3, 100)])
def test_merge_attention(shape, dtype):
    out_a, out_b = (torch.randn(shape).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(shape[:3]) * 10 for _ in range(2))
    lse_a[..., 0] = -torch.inf
    expected = ops.merge_attention(out_a, lse_a, out_b, lse_b)
    actual = ops.merge_attention(*(t.cuda() for t in (out_a, lse_a, out_b, lse_b)))
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[0].cpu(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(actual[1].cpu(), expected[1], atol=1e-5, rtol=1e-5)
