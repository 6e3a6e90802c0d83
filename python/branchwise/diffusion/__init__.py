"""Masked-diffusion language models: how they are asked, and decoders for them."""

from .ancestral import AncestralSampling, Reward, RewardGuidedSampling
from .decoder import BlockDecoder
from .freedave import FreeDave
from .model import MaskedDiffusionConfig, MaskedDiffusionLM
from .rules import EntropyBudget, Static, StepRule, Threshold, TimeSchedule
from .spec import DiffusionSpec, spec_of

__all__ = [
    "AncestralSampling",
    "BlockDecoder",
    "DiffusionSpec",
    "EntropyBudget",
    "FreeDave",
    "MaskedDiffusionConfig",
    "MaskedDiffusionLM",
    "Reward",
    "RewardGuidedSampling",
    "Static",
    "StepRule",
    "Threshold",
    "TimeSchedule",
    "spec_of",
]
