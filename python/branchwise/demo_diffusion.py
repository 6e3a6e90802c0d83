"""`branchwise demo --diffusion`: static decoding and FreeDave side by side, masks and all."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .diffusion import BlockDecoder, FreeDave, MaskedDiffusionLM

# Comes with the sources, not with the wheel.
_FOLDER = Path(__file__).parents[2] / "tests" / "assets" / "stdlib-diffusion"

PROMPTS = {
    "class": 'class Queue:\n    """A first-in, first-out list."""\n\n    def __init__(self, items):\n        self.',
    "test": "def test_empty(self):\n        self.assertEqual(",
    "prose": "The default value is used when the argument is not given.  If the",
}


def load_diffusion(folder: str | None = None, attention: str = "block_causal") -> tuple[MaskedDiffusionLM, Any]:
    """The small model of examples/train_diffusion.py and its tokenizer, in fp32.

    Args:
        folder: None for the one that comes with the sources.
        attention: its weights serve both patterns, see :class:`branchwise.diffusion.MaskedDiffusionConfig`.

    Raises:
        FileNotFoundError: there is no model in the folder.
    """
    from transformers import PreTrainedTokenizerFast

    path = _FOLDER if folder is None else Path(folder)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"no masked-diffusion model in {path}: take tests/assets/stdlib-diffusion of the sources, or train one "
            "with examples/train_diffusion.py"
        )
    model = MaskedDiffusionLM.from_pretrained(path, dtype=torch.float32)
    model.config.attention = attention
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(path)


@dataclass
class _Column:
    """One decoder's half of the screen."""

    title: str
    tokens: Tensor | None = None
    fresh: set[int] = field(default_factory=set)
    forwards: int = 0

    def see(self, tokens: Tensor) -> None:
        before = self.tokens
        self.fresh = set() if before is None else set(torch.nonzero(before != tokens).flatten().tolist())
        self.tokens, self.forwards = tokens.clone(), self.forwards + 1


def run_diffusion_demo(
    folder: str | None = None, max_new_tokens: int = 96, live: bool = True, attention: str = "block_causal"
) -> bool:
    """Decodes every prompt by both decoders and prints a table; whether all texts were equal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    model, tokenizer = load_diffusion(folder, attention)
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": None}
    for decoder in (BlockDecoder(), FreeDave()):  # first calls are slow for everyone
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=16, custom_generate=decoder)
    table = Table(title="one token per step: static decoding, and FreeDave over the same steps")
    for column in ("prompt", "static: forwards", "tokens/s", "FreeDave: forwards", "tokens/s", "ratio", "identical"):
        table.add_column(column, justify="left" if column == "prompt" else "right")
    all_equal = True
    for name, prompt in PROMPTS.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        columns = [_Column("static"), _Column("FreeDave")]
        if live:
            _show(console, model, tokenizer, ids, columns, options)
        texts, speeds, forwards = [], [], []
        for make in (BlockDecoder, FreeDave):
            decoder = make()
            begun = time.perf_counter()
            texts.append(model.generate(ids, custom_generate=decoder, **options))
            speeds.append(max_new_tokens / (time.perf_counter() - begun))
            forwards.append(decoder.stats.forwards)
        if not live:
            console.rule(name)
            console.print(tokenizer.decode(texts[1][0]), markup=False, highlight=False)
        equal = torch.equal(*texts)
        all_equal &= equal
        table.add_row(
            name,
            str(forwards[0]),
            f"{speeds[0]:.0f}",
            str(forwards[1]),
            f"{speeds[1]:.0f}",
            f"{speeds[1] / speeds[0]:.2f}x",
            "yes" if equal else "no",
        )
    console.print(table)
    return all_equal


def _show(console: Any, model: Any, tokenizer: Any, ids: Tensor, columns: list[_Column], options: Any) -> None:
    """Both decodings forward by forward, at a pace that eyes can follow; what a forward has unmasked is green."""
    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    def panel(column: _Column) -> Any:
        text = Text()
        for i, token in enumerate([] if column.tokens is None else column.tokens.tolist()):
            masked = token == model.config.mask_token_id
            style = "dim" if masked else "bold green" if i in column.fresh else "grey50" if i < ids.shape[1] else ""
            text.append("▒▒" if masked else tokenizer.decode([token]), style=style)
        return Panel(text, title=f"{column.title}: {column.forwards} forwards", width=console.width // 2 - 1)

    with Live(console=console, refresh_per_second=20, vertical_overflow="crop") as view:
        for column, make in zip(columns, (BlockDecoder, FreeDave), strict=True):

            def see(row: int, tokens: Tensor, column: _Column = column) -> None:
                column.see(tokens)
                view.update(Columns([panel(c) for c in columns]))
                time.sleep(0.03)

            with contextlib.suppress(KeyboardInterrupt):
                model.generate(ids, custom_generate=make(on_state=see), **options)
        view.update(Columns([panel(c) for c in columns]))
