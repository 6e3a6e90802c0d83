"""Masked-diffusion language models: how they are asked, and decoders for them."""

from .decoder import BlockDecoder
from .freedave import FreeDave
from .model import MaskedDiffusionConfig, MaskedDiffusionLM
from .rules import EntropyBudget, Static, StepRule, Threshold, TimeSchedule
from .spec import DiffusionSpec, spec_of

__all__ = [
    "BlockDecoder",
    "DiffusionSpec",
    "EntropyBudget",
    "FreeDave",
    "MaskedDiffusionConfig",
    "MaskedDiffusionLM",
    "Static",
    "StepRule",
    "Threshold",
    "TimeSchedule",
    "spec_of",
]
