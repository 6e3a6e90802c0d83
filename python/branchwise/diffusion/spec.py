"""What a decoder must know of a masked-diffusion model, and which models are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

# Masks of models whose configuration does not name theirs.
_KNOWN_MASKS = {"llada": 126336, "dream": 151666, "sdar": 151669, "trado": 151669}
_FULL, _BLOCKS = ("llada", "dream"), ("sdar", "trado", "bd3lm")


@dataclass(frozen=True)
class DiffusionSpec:
    """How a masked-diffusion language model is asked.

    Attributes:
        mask_id: the token that stands where none is known yet.
        attention: "full" or "block_causal", see :class:`branchwise.diffusion.MaskedDiffusionConfig`.
        block_size: of a block-causal model, counted from the first token of the text; 0 for a full one.
        shift: 1 if logit row i is about token i + 1 (Dream), 0 if it is about token i.
        forbidden: ids that are never said, beside the mask.
    """

    mask_id: int
    attention: str = "full"
    block_size: int = 0
    shift: int = 0
    forbidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.attention not in ("full", "block_causal"):
            raise ValueError(f"attention must be 'full' or 'block_causal', got {self.attention!r}")
        if self.attention == "block_causal" and self.block_size < 1:
            raise ValueError(f"block_size must be at least 1 for a block-causal model, got {self.block_size}")
        if self.shift not in (0, 1):
            raise ValueError(f"shift must be 0 or 1, got {self.shift}")
        if self.shift and self.attention == "block_causal":
            raise ValueError("shift must be 0 for a block-causal model: a block's first logits lie in the block before")

    def check_prompts(self, prompts: Sequence[Tensor]) -> None:
        """Raises ValueError if a prompt holds the mask, which would be decoded like the masks behind it."""
        for row, prompt in enumerate(prompts):
            if bool((prompt == self.mask_id).any()):
                raise ValueError(f"input_ids of row {row} hold the mask, {self.mask_id}")

    @property
    def never_said(self) -> list[int]:
        return sorted({self.mask_id, *self.forbidden})


def spec_of(model: PreTrainedModel, **overrides: Any) -> DiffusionSpec:
    """The spec of a LLaDA-, Dream-, SDAR-, TraDo- or BD3-LM-style model or a :class:`MaskedDiffusionLM`.

    The family is told by the configuration's ``model_type`` or the class's name, the mask and the block size by
    ``mask_token_id`` and ``block_size``. ``overrides`` are fields of :class:`DiffusionSpec`; with a ``mask_id``, any
    model will do, for instance SDAR's weights in a ``Qwen3ForCausalLM``.

    Raises:
        ValueError: an unknown family without overrides, or a mask or block size that neither says.
    """
    config = model.config
    names = f"{config.model_type} {type(model).__name__}".lower()
    family = next((name for name in (*_FULL, *_BLOCKS, "maskeddiffusion") if name in names), None)
    if family is None and "mask_id" not in overrides:
        raise ValueError(
            f"{type(model).__name__} is no masked-diffusion model that is known (LLaDA, Dream, SDAR, TraDo, BD3-LM, "
            "MaskedDiffusionLM); say what it is, at least mask_id"
        )
    attention = getattr(config, "attention", None) if family == "maskeddiffusion" else None
    if attention is None:
        attention = "block_causal" if family in _BLOCKS else "full"
    attention = overrides.get("attention", attention)
    mask_id = overrides.get("mask_id", getattr(config, "mask_token_id", None))
    if mask_id is None:
        mask_id = config.vocab_size - 1 if family == "bd3lm" else _KNOWN_MASKS.get(family or "")
    if mask_id is None:
        raise ValueError(f"mask_id must be given for {type(model).__name__}, whose configuration has no mask_token_id")
    found = DiffusionSpec(
        mask_id=int(mask_id),
        attention=attention,
        block_size=int(overrides.get("block_size", getattr(config, "block_size", 0) or 0))
        if attention == "block_causal"
        else 0,
        shift=overrides.get("shift", int(family == "dream")),
    )
    return replace(found, **overrides)


def runs_on_kernels(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be replaced by ours; others are asked about whole texts, without a cache."""
    config = model.config.get_text_config()
    windows = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    return bool(getattr(model, "_supports_attention_backend", False)) and not windows and model.device.type == "cpu"
