"""Control flows, one file each."""

from .keyed_sampler import PositionKeyedSampler
from .stats import DecodeStats
from .tree_run import TreeSpeculationOutput
from .tree_speculation import TreeSpeculation

__all__ = ["DecodeStats", "PositionKeyedSampler", "TreeSpeculation", "TreeSpeculationOutput"]
