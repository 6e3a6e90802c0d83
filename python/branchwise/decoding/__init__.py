"""Control flows, one file each."""

from .auto import Auto
from .bandit import Bandit
from .big_little import BigLittle
from .early_exit import EarlyExitLossy
from .keyed_sampler import PositionKeyedSampler
from .reverse import ReverseSpeculative
from .stats import DecodeStats
from .tree_run import TreeSpeculationOutput
from .tree_speculation import TreeSpeculation

__all__ = [
    "Auto",
    "Bandit",
    "BigLittle",
    "DecodeStats",
    "EarlyExitLossy",
    "PositionKeyedSampler",
    "ReverseSpeculative",
    "TreeSpeculation",
    "TreeSpeculationOutput",
]
