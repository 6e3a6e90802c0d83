"""Linear layers whose rows do not depend on each other."""

import torch
from torch import Tensor

from ._load import refuse_grad


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, where a row's bits are those that it has among any other rows, for any number of
    threads.

    The libraries behind ``torch.nn.functional.linear`` choose by the number of rows how they cut a product, and with
    it the order of its sums. Here that order depends on K alone (and on the instruction set, see
    :func:`branchwise.ops.cpu_isa`; on a GPU, whether weights lie on 16 bytes); sums are in fp32, and rounded once, with
    the bias. Weights are read once from where they lie, not packed again at every call, which is what a few rows cost.

    Args:
        x: [..., K] float32, bfloat16 or float16; copied if it is not contiguous.
        weight: [N, K], as ``torch.nn.Linear`` has it; its dtype is that of ``x``, its last dimension contiguous.
        bias: [N], of the same dtype.

    Returns:
        [..., N]. Subnormal numbers may count as zero in bfloat16.

    Raises:
        RuntimeError: a wrong shape or dtype, or a tensor that requires grad outside ``torch.no_grad()``.

    Source: our own. CPU and CUDA.
    """
    refuse_grad("invariant_linear", x, weight, bias)
    return torch.ops.branchwise.invariant_linear.default(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Slow form of :func:`invariant_linear`, in fp64, unrounded."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


@torch.library.register_fake("branchwise::invariant_linear")
def _linear_fake(x, weight, bias=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
