"""Where candidate trees come from, one file each."""

from .base import Drafter, DraftRequest, DraftSession, Needs, Verified
from .candidates import Candidates
from .early_exit import EarlyExit
from .hybrid import Hybrid
from .lookahead import Jacobi, Lookahead
from .model import Confident, Model
from .none import NoDrafts
from .prompt_lookup import PromptLookup
from .suffix import Suffix
from .token_recycling import TokenRecycling
from .trie import Trie

BY_NAME = {
    "jacobi": Jacobi,
    "lookahead": Lookahead,
    "none": NoDrafts,
    "prompt_lookup": PromptLookup,
    "suffix": Suffix,
    "token_recycling": TokenRecycling,
    "trie": Trie,
}


def make_drafter(drafter: str | Drafter) -> Drafter:
    """A drafter from its name, or the object itself."""
    if not isinstance(drafter, str):
        return drafter
    if drafter not in BY_NAME:
        raise ValueError(f"drafter must be a Drafter, 'auto' or one of {', '.join(sorted(BY_NAME))}, got {drafter!r}")
    return BY_NAME[drafter]()


__all__ = [
    "BY_NAME",
    "Candidates",
    "Confident",
    "DraftRequest",
    "DraftSession",
    "Drafter",
    "EarlyExit",
    "Hybrid",
    "Jacobi",
    "Lookahead",
    "Model",
    "Needs",
    "NoDrafts",
    "PromptLookup",
    "Suffix",
    "TokenRecycling",
    "Trie",
    "Verified",
    "make_drafter",
]
