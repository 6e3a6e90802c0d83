"""The small steps of a decoder layer, one op each."""

import torch
from torch import Tensor

from ._load import refuse_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, weight_first: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` over the last dimension, in fp32.

    A row's bits do not depend on the other rows, nor on the number of threads.

    Args:
        x: [..., H] float32, bfloat16 or float16; copied if it is not contiguous.
        weight: [H], of the same dtype.
        eps: added to the mean square.
        offset: added to the weight; 1 in Gemma's norms.
        weight_first: round the product with the weight only, as Gemma's and OLMo 2's norms do; otherwise the quotient
            is rounded to the dtype of ``x``, and then the product, as in Llama's.

    Returns:
        As ``x``, contiguous.

    Raises:
        RuntimeError: a wrong shape or dtype, an ``eps`` that is negative or not finite, or a tensor that requires grad
            outside ``torch.no_grad()``.

    Source: Zhang and Sennrich 2019, rounded as in transformers. CPU and CUDA.
    """
    refuse_grad("rms_norm", x, weight)
    return torch.ops.branchwise.rms_norm.default(x, weight, eps, offset, weight_first)


@torch.library.register_fake("branchwise::rms_norm")
def _(x, weight, eps, offset=0.0, weight_first=False):
    return x.new_empty(x.shape)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, weight_first: bool = False
) -> Tensor:
    """The definition of :func:`rms_norm`, with sums in fp64."""
    scale = 1.0 / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    out = x.double() * scale
    factor = offset + weight.double()
    return (out * factor if weight_first else out.to(x.dtype).double() * factor).to(x.dtype)


def apply_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys: ``x * cos + rotate_half(x) * sin``, bit for bit as transformers'
    ``apply_rotary_pos_emb``.

    Args:
        query: [B, Hq, T, D] float32, bfloat16 or float16, D even; strided but for the last dimension.
        key: [B, Hkv, T, D], of the same dtype.
        cos, sin: [B or 1, T, D], of the same dtype.

    Returns:
        Both, in new tensors whose memory is [B, T, heads, D].

    Raises:
        RuntimeError: a wrong shape or dtype, or a tensor that requires grad outside ``torch.no_grad()``.

    Source: Su et al. 2021, with halves as in GPT-NeoX. CPU and CUDA.
    """
    refuse_grad("apply_rope", query, key)
    return torch.ops.branchwise.apply_rope.default(query, key, cos, sin)


@torch.library.register_fake("branchwise::apply_rope")
def _(query, key, cos, sin):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key))


def apply_rope_reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of :func:`apply_rope`."""
    half = query.shape[-1] // 2
    turned = [torch.cat([-x[..., half:], x[..., :half]], -1) for x in (query, key)]
    query, key = (x * cos[:, None] + y * sin[:, None] for x, y in zip((query, key), turned, strict=True))
    return query, key
