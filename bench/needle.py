"""Does a KV policy still find the needle? SmolLM2-135M reads prose (the Python language reference, as shipped with
Python) with facts hidden at several depths, and is asked for one.

Method: "needle" hides one fact ("The secret code of the vault is 48213."), "keys" four with different names, of which
one is asked for. Per length, depth and kind one prompt, the same for every policy; greedy, 10 tokens, the answer must
hold the number. The question is part of the prompt, so window policies see it. Prompts that the dense model gets wrong
count against it and everybody. Budgets are tokens per KV head (per layer for PyramidKV and AdaKV on average).
`--peer` runs NVIDIA's kvpress instead (`make bench-kvpress` makes its environment: it needs transformers < 5.3) on the
same prompts at the same budgets, and adds its rows to the same JSON.

How to read: the share of right answers over depths, per kind and length; "bytes" is what the KV store held after the
prompt, over dense. The heat map has a row per policy and budget and a column per kind, length and depth.

Artefacts: one prompt per cell, a 135M model; bf16. SpecKV and SpecPC look ahead with the model itself.

Reference results: bench/results/needle-*.json, and docs/kv.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pydoc_data.topics
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from branchwise.cache import CACHE_NAME
from branchwise.demo import load_smollm2

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "needle.png"
NAMES = ["vault", "harbour", "library", "tower", "garden", "museum", "station", "bridge"]


def sentences() -> list[str]:
    text = " ".join(re.sub(r"[*`|=~^\-]{2,}", "", topic) for _, topic in sorted(pydoc_data.topics.topics.items()))
    return [s for s in re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", text)) if 40 < len(s) < 300]


def make_prompt(tokenizer: Any, prose: list[str], kind: str, length: int, depth: float) -> tuple[str, str]:
    """A prompt of about ``length`` tokens, and the number it asks for."""
    r = random.Random(f"{kind} {length} {depth}")
    facts = [(name, str(r.randint(10000, 99999))) for name in r.sample(NAMES, 1 if kind == "needle" else 4)]
    begin, text, used = r.randrange(len(prose) - 600), [], 0
    while used < length:
        text.append(prose[begin + len(text)])
        used += len(tokenizer(text[-1]).input_ids)
    for i, (name, code) in enumerate(facts):
        at = depth if i == 0 else r.random()
        text.insert(int(at * len(text)), f"The secret code of the {name} is {code}.")
    name, code = facts[0]
    question = f"What is the secret code of the {name}? Answer with the number only."
    message = f"Read this text.\n\n{' '.join(text)}\n\n{question}"
    chat = [{"role": "user", "content": message}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return f"{prompt}The secret code of the {name} is", code


def policies(model: Any, learned: dict[str, Any], budget: int) -> dict[str, Any]:
    from branchwise import kv

    layers = model.config.num_hidden_layers
    window = min(32, budget // 4)
    return {
        "StreamingLLM": kv.StreamingLLM(4, budget - 4),
        "H2O": kv.H2O(budget),
        "TOVA": kv.TOVA(budget),
        "SnapKV": kv.SnapKV(budget, window),
        "PyramidKV": kv.PyramidKV(budget, window),
        "AdaKV": kv.AdaKV(budget, window),
        "GemFilter": kv.GemFilter(budget, layers // 2),
        "PromptDistill": kv.PromptDistill([budget], [layers // 2], truncate=-1),
        "SpecKV": kv.SpecKV(model, budget, 8, window),
        "SpecPC": kv.SpecPC(model, budget, window, first_layer=layers // 4, kernel=32),
        "HeadwiseKV": kv.HeadwiseKV(learned["gates"], 0.5, 16, budget),
        "SentenceKV": kv.SentenceKV(learned["marks"], budget, sinks=4, recent=window, window=window),
        "SpeContext": kv.SpeContext(budget=budget, min_length=0),
        "Quest": kv.Quest(budget, min_length=0),
        "Quest e4m3": kv.Quest(budget, min_length=0, summary_dtype=torch.float8_e4m3fn),
        "DELTA": kv.DELTA(budget, learned["planners"], recent=32, min_length=0),
    }


def learn(model: Any, tokenizer: Any, prose: list[str]) -> dict[str, Any]:
    """What policies need to know of a model, from some of the prose."""
    from branchwise import kv

    text = tokenizer(" ".join(prose[:60]), return_tensors="pt").input_ids[0, :1500]
    return {
        "gates": kv.estimate_gates(model, text),
        "planners": kv.place_planners(model, text, count=4),
        "marks": kv.sentence_marks(tokenizer),
    }


def presses(budget: int, length: int) -> dict[str, Any]:
    kvpress = importlib.import_module("kvpress")
    ratio = max(0.0, 1 - budget / length)
    window = min(32, budget // 4)
    return {
        "StreamingLLM": kvpress.StreamingLLMPress(ratio, n_sink=4),
        "H2O": None,  # ObservedAttentionPress needs eager attention, and its probabilities are means, not sums
        "TOVA": kvpress.TOVAPress(ratio),
        "SnapKV": kvpress.SnapKVPress(ratio, window_size=window),
        "PyramidKV": kvpress.PyramidKVPress(ratio, window_size=window),
        "AdaKV": kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, window_size=window)),
    }


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, context: Callable[[], Any]) -> tuple[str, int]:
    """What the model says, and the bytes of its cache after the prompt."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with context():
        out = model.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    cache = out[CACHE_NAME]
    held = getattr(cache, "num_bytes", None)
    if held is None:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return tokenizer.decode(out.sequences[0, ids.shape[1] :]), held


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    model, tokenizer = load_smollm2(torch.bfloat16)
    prose, rows = sentences(), []
    learned = {} if args.peer else learn(model, tokenizer, prose)
    for kind in args.kinds:
        for length in args.lengths:
            for depth in args.depths:
                prompt, code = make_prompt(tokenizer, prose, kind, length, depth)
                tokens = len(tokenizer(prompt, add_special_tokens=False).input_ids)
                jobs: dict[tuple[str, int], Callable[[], Any]] = {}
                if not args.peer:
                    jobs["dense", 0] = nullcontext
                for budget in args.budgets:
                    made = presses(budget, tokens) if args.peer else policies(model, learned, budget)
                    for name, policy in made.items():
                        if policy is None or (args.policies and name not in args.policies):
                            continue
                        jobs[name, budget] = _context(model, policy, args.peer)
                for (name, budget), context in jobs.items():
                    said, held = answer(model, tokenizer, prompt, context)
                    rows.append(
                        {
                            "policy": name,
                            "source": "kvpress" if args.peer else "branchwise",
                            "budget": budget,
                            "kind": kind,
                            "length": length,
                            "tokens": tokens,
                            "depth": depth,
                            "right": code in said,
                            "bytes": held,
                        }
                    )
                marks = "".join("x" if row["right"] else "." for row in rows[-len(jobs) :])
                print(kind, length, depth, marks, flush=True)
    return rows


def _context(model: Any, policy: Any, peer: bool) -> Callable[[], Any]:
    if peer:
        return lambda: policy(model)
    from branchwise import sparse_kv

    return lambda: sparse_kv(model, policy)


def table(rows: list[dict[str, Any]]) -> str:
    columns = sorted({(row["kind"], row["length"]) for row in rows}, reverse=True)
    lines = ["| policy | budget | " + " | ".join(f"{kind} {length}" for kind, length in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for source, name, budget in sorted({(row["source"], row["policy"], row["budget"]) for row in rows}, key=_order):
        cells = []
        for kind, length in columns:
            right = [
                row["right"]
                for row in rows
                if (row["source"], row["policy"], row["budget"]) == (source, name, budget)
                and (row["kind"], row["length"]) == (kind, length)
            ]
            cells.append(f"{sum(right)}/{len(right)}" if right else "")
        label = name if source == "branchwise" else f"{name} ({source})"
        lines.append(f"| {label} | {budget or 'all'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _order(key: tuple[str, str, int]) -> tuple[bool, str, str, int]:
    source, name, budget = key
    return name != "dense", name, source, budget


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = sorted({(row["source"], row["policy"], row["budget"]) for row in rows}, key=_order)
    columns = sorted({(row["kind"], row["length"], row["depth"]) for row in rows})
    grid = torch.full((len(lines), len(columns)), torch.nan)
    for row in rows:
        line = lines.index((row["source"], row["policy"], row["budget"]))
        grid[line, columns.index((row["kind"], row["length"], row["depth"]))] = float(row["right"])
    figure, axes = plt.subplots(figsize=(2 + 0.28 * len(columns), 1 + 0.2 * len(lines)))
    axes.imshow(grid.numpy(), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(
        range(len(lines)),
        [f"{name}{'' if source == 'branchwise' else f' ({source})'} {budget or ''}" for source, name, budget in lines],
        fontsize=6,
    )
    names = [f"{kind} {length} {depth:.0%}" for kind, length, depth in columns]
    axes.set_xticks(range(len(columns)), names, rotation=90, fontsize=6)
    axes.set_title("answers: green is right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["needle", "keys"], choices=["needle", "keys"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1000, 2000])
    parser.add_argument("--depths", nargs="+", type=float, default=[0.1, 0.5, 0.9])
    parser.add_argument("--budgets", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--policies", nargs="+", help="names; all by default")
    parser.add_argument("--peer", action="store_true", help="run kvpress instead of branchwise")
    parser.add_argument("--json", type=Path, help="file to write or, with --peer, to add to")
    args = parser.parse_args()
    rows = run(args)
    path = args.json
    if path is None:
        from datetime import date

        path = RESULTS / f"needle-{date.today().isoformat()}.json"
    if args.peer and path.exists():
        old = json.loads(path.read_text())["rows"]
        rows = [row for row in old if row["source"] != "kvpress"] + rows
    path.parent.mkdir(exist_ok=True)
    FIGURE.parent.mkdir(exist_ok=True)
    body = ",\n    ".join(json.dumps(row) for row in rows)
    path.write_text(f'{{\n  "rows": [\n    {body}\n  ]\n}}\n')
    plot(rows, FIGURE)
    print(table(rows))
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
