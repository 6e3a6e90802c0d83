"""What deterministic decoding costs, and what it gives: the op, forwards of SmolLM2 over trees, and texts asked twice.

Method: "ops": path_attention and tree_attention on random trees of T nodes behind --prefixes slots, one after the
other over caches that together exceed the processor's. "forwards": the same for forwards of SmolLM2, with
`deterministic` and without (T = 1: plain decoding). Medians of the ratios. "texts": --per-kind prompts per task kind,
--new-tokens tokens: plain decoding (`drafter="none"`), then "auto" cold, then "auto" with the same request again, with
`deterministic` and without, one after the other per prompt.

How to read: "ops" and "forwards": time with over time without. "texts": in how many of the requests with drafts (cold
and again) the text was the one without drafts; tokens per second of the request asked again as a multiple of plain
decoding's, both of one form.

Artefacts: texts end where the model ends them, so the two forms may decode texts of different lengths.

Reference result: see docs/kernels-figures.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch

import facts
import prompts
from branchwise import KVStore, TreeSpeculation, ops
from branchwise.attention import use_attention
from branchwise.demo import load_smollm2
from branchwise.forward import StoredModel

SHAPES = {"SmolLM2": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}  # query heads, KV heads, head dim


def random_tree(T: int, g: torch.Generator, seq_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and positions of a tree in which a node's parent is one of the six before it."""
    parents = torch.tensor([[-1, *(int(torch.randint(max(0, i - 6), i, (), generator=g)) for i in range(1, T))]])
    return ops.build_tree(parents.int(), seq_lens)[:2]


def compare(runs: list[Callable[[], Any]], repeats: int) -> tuple[float, float]:
    """Median seconds of the second, and the median of the first over the second."""
    times = [[facts.seconds(run) for run in runs] for _ in range(repeats + 1)][1:]
    return median(b for _, b in times), median(a / b for a, b in times)


def time_ops(options: argparse.Namespace) -> list[dict]:
    rows = []
    for dtype, (shape, (Hq, Hkv, D)), P, T in product(options.dtypes, SHAPES.items(), options.prefixes, options.nodes):
        g = torch.Generator().manual_seed(0)
        lens = torch.tensor([P], dtype=torch.int32)
        calls = max(2, min(30, 200_000_000 // (P * Hkv * D * 4)))
        caches = [torch.randn(2, 1, Hkv, P + T, D, generator=g).to(getattr(torch, dtype)) for _ in range(calls)]
        query = torch.randn(1, T, Hq, D, generator=g).to(getattr(torch, dtype)).transpose(1, 2)
        mask = random_tree(T, g, lens)[0] if T > 1 else None

        def run(op, query=query, caches=caches, lens=lens, mask=mask):
            for keys, values in caches:
                op(query, keys, values, lens, mask)

        both = [lambda op=op, run=run: run(op) for op in (ops.path_attention, ops.tree_attention)]
        usual, ratio = compare(both, options.repeats)
        us = round(usual / calls * 1e6, 1)
        rows.append({"dtype": dtype, "shape": shape, "prefix": P, "T": T, "us": us, "ratio": round(ratio, 3)})
        print(f"{dtype} {shape} prefix {P} T {T}: {us} us, path_attention {ratio:.2f} of it", flush=True)
    return rows


class Forward:
    def __init__(self, model, P: int, T: int) -> None:
        g = torch.Generator().manual_seed(0)
        store = KVStore(1, P + 2 * T + 8)
        self.model, self.targets = model, {on: StoredModel(model, store, deterministic=on) for on in (True, False)}
        with use_attention(model):
            self.targets[False].extend([torch.randint(0, 49152, (P,), generator=g)])
        self.tokens = torch.randint(0, 49152, (1, T), generator=g)
        self.mask, self.positions = random_tree(T, g, store.seq_lens)

    def run(self, deterministic: bool) -> None:
        with use_attention(self.model):
            self.targets[deterministic].forward(
                self.tokens, self.positions, self.mask if self.tokens.shape[1] > 1 else None
            )


def time_forwards(options: argparse.Namespace) -> list[dict]:
    rows = []
    for dtype in options.dtypes:
        model = load_smollm2(getattr(torch, dtype))[0]
        for P, T in product(options.prefixes, options.nodes):
            step = Forward(model, P, T)
            usual, ratio = compare([lambda step=step, on=on: step.run(on) for on in (True, False)], options.repeats)
            rows.append({"dtype": dtype, "prefix": P, "T": T, "ms": round(usual * 1e3, 2), "ratio": round(ratio, 3)})
            print(f"{dtype} prefix {P} T {T}: {usual * 1e3:.2f} ms, deterministic {ratio:.3f} of it", flush=True)
    return rows


def ask(model, tokenizer, text: str, spec: TreeSpeculation, new_tokens: int) -> tuple[list[int], float]:
    """What it says, and tokens per second behind the first."""
    inputs = tokenizer(text, return_tensors="pt")
    begun = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, custom_generate=spec)
    seconds = time.perf_counter() - begun - spec.stats.seconds_prefill
    said = out[0, inputs["input_ids"].shape[1] :].tolist()
    return said, (len(said) - 1) / seconds


def ask_twice(options: argparse.Namespace) -> list[dict]:
    rows = []
    for dtype in options.dtypes:
        model, tokenizer = load_smollm2(getattr(torch, dtype))
        for kind, texts in prompts.by_kind().items():
            for deterministic in (False, True):
                same, cold, again = 0, [], []
                for text in texts[: options.per_kind]:
                    none, spec = (TreeSpeculation(name, deterministic=deterministic) for name in ("none", "auto"))
                    plain, speed = ask(model, tokenizer, text, none, options.new_tokens)
                    for ratios in (cold, again):
                        said, with_drafts = ask(model, tokenizer, text, spec, options.new_tokens)
                        same += said == plain
                        ratios.append(with_drafts / speed)
                row = {"dtype": dtype, "kind": kind, "deterministic": deterministic, "equal": same, "of": 2 * len(cold)}
                row |= {"cold": round(median(cold), 2), "again": round(median(again), 2)}
                rows.append(row)
                print(
                    f"{dtype} {kind:>10}, {'deterministic' if deterministic else 'usual'}: {same} of {2 * len(cold)} "
                    f"texts as without drafts; cold {median(cold):.2f}x, again {median(again):.2f}x",
                    flush=True,
                )
    return rows


PARTS = {"ops": time_ops, "forwards": time_forwards, "texts": ask_twice}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--prefixes", nargs="+", type=int, default=[200, 1000, 4000])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 2, 8, 16, 32, 48])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--per-kind", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    options = parser.parse_args()
    machine = facts.machine()
    print(machine)
    for part in options.parts:
        print(f"written to {facts.record(f'deterministic-{part}', machine, PARTS[part](options))}")


if __name__ == "__main__":
    main()
