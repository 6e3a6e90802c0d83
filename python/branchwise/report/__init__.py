"""Checks and tables about finished runs."""

from .lossless import greedy_gaps, near_tie_bound

__all__ = ["greedy_gaps", "near_tie_bound"]
