"""Where candidate trees come from, one file each."""

from .base import Drafter, DraftSession
from .candidates import Candidates
from .prompt_lookup import PromptLookup
from .suffix import Suffix
from .trie import Trie

BY_NAME = {"trie": Trie, "suffix": Suffix, "prompt_lookup": PromptLookup}


def make_drafter(drafter: str | Drafter) -> Drafter:
    """A drafter from its name, or the object itself."""
    if not isinstance(drafter, str):
        return drafter
    if drafter not in BY_NAME:
        raise ValueError(f"drafter must be a Drafter or one of {', '.join(sorted(BY_NAME))}, got {drafter!r}")
    return BY_NAME[drafter]()


__all__ = ["BY_NAME", "Candidates", "DraftSession", "Drafter", "PromptLookup", "Suffix", "Trie", "make_drafter"]
