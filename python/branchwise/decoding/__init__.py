"""Control flows, one file each."""

from .keyed_sampler import PositionKeyedSampler
from .stats import DecodeStats
from .tree_speculation import TreeSpeculation, TreeSpeculationOutput

__all__ = ["DecodeStats", "PositionKeyedSampler", "TreeSpeculation", "TreeSpeculationOutput"]
