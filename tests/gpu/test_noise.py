"""node_uniforms on CUDA: the very numbers of the CPU."""

import pytest
import torch

from branchwise import ops


@pytest.mark.parametrize(("B", "N"), [(1, 1), (3, 64), (64, 1000), (2, 0)])
def test_equals_the_cpu(B, N, device):
    g = torch.Generator().manual_seed(B)
    draw = lambda *shape: torch.randint(-(2**62), 2**62, shape, generator=g)  # noqa: E731
    args = draw(B), draw(B), draw(B, N), draw(B, N)
    assert torch.equal(device.node_uniforms(*args, 2), ops.node_uniforms(*args, 2))
