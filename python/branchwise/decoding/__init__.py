"""Control flows, one file each."""

from .auto import Auto
from .bandit import Bandit
from .early_exit import EarlyExitLossy
from .keyed_sampler import PositionKeyedSampler
from .stats import DecodeStats
from .tree_run import TreeSpeculationOutput
from .tree_speculation import TreeSpeculation

__all__ = [
    "Auto",
    "Bandit",
    "DecodeStats",
    "EarlyExitLossy",
    "PositionKeyedSampler",
    "TreeSpeculation",
    "TreeSpeculationOutput",
]
