"""Control flows, one file each."""

from .stats import DecodeStats
from .tree_speculation import TreeSpeculation, TreeSpeculationOutput

__all__ = ["DecodeStats", "TreeSpeculation", "TreeSpeculationOutput"]
