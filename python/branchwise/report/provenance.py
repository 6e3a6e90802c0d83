"""Who wrote which token? Coloured text for terminals, and a page for browsers that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..decoding.reverse import FALLBACK, Trace
from ..decoding.stats import DecodeStats
from ..decoding.step_speculative import StepTrace

# Distinguishable by the colour-blind, and on dark and light terminals.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass
class Provenance:
    """A text and who wrote each of its tokens.

    Attributes:
        tokens: ids.
        writers: a name per token.
        notes: a line per token for whoever points at it; empty strings for none.
    """

    tokens: list[int]
    writers: list[str]
    notes: list[str]

    def __post_init__(self) -> None:
        for name in ("writers", "notes"):
            if len(getattr(self, name)) != len(self.tokens):
                raise ValueError(
                    f"{name} must have one entry per token, {len(self.tokens)}, got {len(getattr(self, name))}"
                )

    @classmethod
    def of(cls, run: StepTrace | Trace | DecodeStats, tokens: Sequence[int] = (), row: int = 0) -> Provenance:
        """Of a trace of :class:`branchwise.StepSpeculative` or :class:`branchwise.ReverseSpeculative`, or of the stats
        of a tree decoder such as :class:`branchwise.BigLittle`, with the new ``tokens`` of its row ``row``."""
        if isinstance(run, StepTrace):
            notes = []
            for step in run.steps:
                note = "" if step.get("score") is None else f"score {step['score']:.2f}"
                note += f", {len(step['rejected'])} tokens of the small model rejected" if "rejected" in step else ""
                notes += [note] * len(step["tokens"])
            return cls(run.tokens, run.writers, notes)
        if isinstance(run, Trace):
            writers = ["student" if trial == FALLBACK else "teacher" for trial in run.trials]
            notes = [
                f"draw {trial}, student's p {p:.3g}" if trial != FALLBACK else f"student's p {p:.3g}"
                for trial, p in zip(run.trials, run.probabilities, strict=True)
            ]
            return cls(list(run.tokens), writers, notes)
        flags = run.accepted_flags[row]
        return cls(list(tokens)[: len(flags)], ["draft" if flag else "model" for flag in flags], [""] * len(flags))

    @property
    def shares(self) -> dict[str, float]:
        """Of the tokens, per writer, the most first."""
        names = sorted(set(self.writers), key=lambda name: (-self.writers.count(name), name))
        return {name: self.writers.count(name) / len(self.writers) for name in names}


def _pieces(provenance: Provenance, tokenizer: Any) -> list[tuple[str, str, str]]:
    """Runs of tokens with one writer and note: text, writer, note. What a token adds to the text is seen only with
    those before it, so runs are cut from decodings of the whole."""
    runs: list[tuple[int, Hashable]] = []
    for i, key in enumerate(zip(provenance.writers, provenance.notes, strict=True)):
        if not runs or runs[-1][1] != key:
            runs.append((i, key))
    ends = [begin for begin, _ in runs[1:]] + [len(provenance.tokens)]
    pieces, said = [], ""
    for (begin, _), end in zip(runs, ends, strict=True):
        text = tokenizer.decode(provenance.tokens[:end])
        # A character whose bytes are spread over tokens belongs to the run that completes it.
        whole = text.rstrip("\ufffd") if end < len(provenance.tokens) else text
        pieces.append((whole[len(said) :], provenance.writers[begin], provenance.notes[begin]))
        said = whole if len(whole) > len(said) else said
    return pieces


def to_terminal(provenance: Provenance, tokenizer: Any) -> Any:
    """A ``rich.text.Text`` in the writers' colours, with a legend below; print it with ``rich.print``.

    Args:
        provenance: of one text.
        tokenizer: anything with ``decode``.

    Raises:
        ModuleNotFoundError: the package ``rich`` is not installed.
    """
    from rich.text import Text

    shares = provenance.shares
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(shares)}
    text = Text()
    for piece, writer, _ in _pieces(provenance, tokenizer):
        text.append(piece, style=colour[writer])
    text.append("\n\n")
    for name, share in shares.items():
        text.append(f"{name} {share:.0%}  ", style=f"bold {colour[name]}")
    return text


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere }}
section {{ border-top: 1px solid #ccc; padding: 1rem 0 }}
.legend span {{ margin-right: 1.2em; font-weight: 600 }}
{styles}
</style></head><body><h1>{title}</h1>
{body}
<script type="application/json" id="provenance">{data}</script>
</body></html>
"""


def to_html(
    path: str | Path,
    texts: Sequence[Provenance],
    tokenizer: Any,
    prompts: Sequence[str] = (),
    title: str = "branchwise",
) -> None:
    """Writes a page that needs no other file: every text in its writers' colours, notes where the pointer is, and the
    tokens and writers as JSON.

    Args:
        path: of the page.
        texts: in order.
        tokenizer: anything with ``decode``.
        prompts: shown above the texts; as many, or none.
        title: of the page.

    Raises:
        ValueError: not as many prompts as texts.
    """
    if prompts and len(prompts) != len(texts):
        raise ValueError(f"prompts must be as many as texts, {len(texts)}, got {len(prompts)}")
    names = list(dict.fromkeys(name for text in texts for name in text.shares))
    styles = "\n".join(f".w{i} {{ color: {_COLOURS[i % len(_COLOURS)]} }}" for i in range(len(names)))
    sections = []
    for i, text in enumerate(texts):
        prompt = f'<p class="text"><b>{html.escape(prompts[i])}</b></p>' if prompts else ""
        spans = "".join(
            f'<span class="w{names.index(writer)}" title="{html.escape(": ".join(filter(None, (writer, note))))}">'
            f"{html.escape(piece)}</span>"
            for piece, writer, note in _pieces(text, tokenizer)
        )
        legend = "".join(
            f'<span class="w{names.index(name)}">{html.escape(name)} {share:.0%}</span>'
            for name, share in text.shares.items()
        )
        sections.append(f'<section>{prompt}<p class="text">{spans}</p><p class="legend">{legend}</p></section>')
    data = json.dumps([{"tokens": text.tokens, "writers": text.writers} for text in texts]).replace("<", "\\u003c")
    page = _PAGE.format(title=html.escape(title), styles=styles, body="\n".join(sections), data=data)
    Path(path).write_text(page, encoding="utf-8")
