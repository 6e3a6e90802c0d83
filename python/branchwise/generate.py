"""One call for users who do not want to think about decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from .decoding import TreeSpeculation, TreeSpeculationOutput


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    decoder: TreeSpeculation | None = None,
    tokenizer: Any = None,
    stop_strings: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Tensor | TreeSpeculationOutput:
    """``model.generate`` with a branchwise decoder; all other arguments are passed on.

    Use it for ``stop_strings``: transformers asks for a ``tokenizer`` with them, but drops the tokenizer when
    ``custom_generate`` is a callable, so ``model.generate`` itself cannot combine the two.

    Args:
        model: any supported decoder-only model.
        inputs: i64[B, N] token ids, left-padded, or pass ``input_ids`` and ``attention_mask`` by name.
        decoder: keeps what it learned across calls if you keep it; a fresh ``TreeSpeculation()`` by default.
        tokenizer, stop_strings: stop a row after the token that completes one of the strings.

    Returns:
        What ``model.generate`` returns.

    Raises:
        ValueError: ``stop_strings`` without ``tokenizer``, or a request or model that the decoder refuses.
    """
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings needs the model's tokenizer: pass tokenizer=...")
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
    return model.generate(inputs, custom_generate=decoder or TreeSpeculation(), **kwargs)
