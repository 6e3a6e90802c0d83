"""node_uniforms on the GPU: the very numbers of the CPU."""

import pytest
import torch

from branchwise import ops

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and ops.CUDA_LOADED), reason="needs CUDA")


@pytest.mark.parametrize(("B", "N"), [(1, 1), (3, 64), (64, 1000), (2, 0)])
def test_equals_the_cpu(B, N):
    g = torch.Generator().manual_seed(B)
    draw = lambda *shape: torch.randint(-(2**62), 2**62, shape, generator=g)  # noqa: E731
    args = draw(B), draw(B), draw(B, N), draw(B, N)
    expected = ops.node_uniforms(*args, 2)
    assert torch.equal(ops.node_uniforms(*(x.cuda() for x in args), 2).cpu(), expected)
