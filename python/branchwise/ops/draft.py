"""What drafters read of logits. Cards fspad ("topk over V") and suffix-decoding (token recycling)."""

import torch
from torch import Tensor

from ._load import refuse_grad


def top_tokens(logits: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The likeliest tokens and their log-probabilities, in one read of the logits.

    Args:
        logits: [..., V] float32, bfloat16 or float16, contiguous in V. NaN is never among the likeliest.
        k: how many, at least 1.
        exclude: i64[E] tokens that are passed over; they keep their part of the probability.

    Returns:
        ``tokens`` i32[..., k], likeliest first, of equals the lower one first, and ``log_probs`` f32[..., k]. Where
        fewer than k tokens are above -inf, -1 and -inf. Log-probabilities are NaN in rows that hold NaN or +inf.

    Raises:
        RuntimeError: a wrong shape or dtype, or ``k`` below 1.
    """
    refuse_grad("top_tokens", logits)
    tokens, log_probs = torch.ops.branchwise.top_tokens.default(logits.flatten(0, -2), k, exclude)
    shape = (*logits.shape[:-1], k)
    return tokens.view(shape), log_probs.view(shape)


@torch.library.register_fake("branchwise::top_tokens")
def _(logits, k, exclude=None):
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


def top_tokens_reference(logits: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition of :func:`top_tokens`, with a full sort, in float64."""
    values = logits.double()
    log_probs = values - values.logsumexp(-1, keepdim=True)
    odd = (values.isnan() | values.isposinf()).any(-1, keepdim=True)
    log_probs = log_probs.masked_fill(odd, torch.nan)
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if exclude is not None:
        values = values.index_fill(-1, exclude, -torch.inf)
    pad = max(k - values.shape[-1], 0)
    values = torch.nn.functional.pad(values, (0, pad), value=-torch.inf)
    log_probs = torch.nn.functional.pad(log_probs, (0, pad), value=-torch.inf)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    values, order = values[..., :k], order[..., :k]
    there = values > -torch.inf
    return (
        torch.where(there, order, -1).int(),
        torch.where(there, log_probs.gather(-1, order), -torch.inf),
    )
