"""Checks and tables about finished runs, and pictures of who wrote what."""

from .lossless import greedy_gaps, near_tie_bound
from .provenance import Provenance, to_html, to_terminal

__all__ = ["Provenance", "greedy_gaps", "near_tie_bound", "to_html", "to_terminal"]
