"""Is a text greedy decoding, up to near-ties? In 16 bits, kernels that sum in other orders round differently, so two
correct greedy decoders, transformers' and ours, may part where the two best logits nearly tie."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def greedy_gaps(model: PreTrainedModel, text: Tensor, prompt_length: int) -> Tensor:
    """How far the plain model preferred another token, at every generated position.

    Runs the unpatched model once over the whole text, so that every position is judged on the text that was really
    decoded, also behind the first difference from another decoder.

    Args:
        text: i64[1, N] prompt and output of one row, without padding.
        prompt_length: tokens of the prompt, at least 1 and less than N.

    Returns:
        f32[N - prompt_length]: largest logit minus the logit of the token that was emitted; 0 where it is the argmax.

    Raises:
        ValueError: ``text`` is not one row, or ``prompt_length`` is out of range.
    """
    if text.dim() != 2 or text.shape[0] != 1:
        raise ValueError(f"text must have shape [1, N], got {tuple(text.shape)}")
    if not 1 <= prompt_length < text.shape[1]:
        raise ValueError(f"prompt_length must lie between 1 and {text.shape[1] - 1}, got {prompt_length}")
    logits = model(text).logits[0, prompt_length - 1 : -1].float()
    emitted = logits.gather(1, text[0, prompt_length:, None])[:, 0]
    return logits.amax(-1) - emitted


def near_tie_bound(model: PreTrainedModel, largest_logit: float) -> float:
    """The gap below which two logits count as tied in the model's dtype.

    Four times the relative spacing of the dtype at the largest logit, that is four to eight units in its last place.
    For bfloat16 and logits up to 20 that is 0.63; on SmolLM2 the largest gap seen was 0.25. For float32 it is 1e-5.
    """
    return 4 * torch.finfo(model.dtype).eps * max(largest_logit, 1.0)
