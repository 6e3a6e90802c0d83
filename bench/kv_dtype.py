"""KV caches in e4m3 against those in bf16: attention, forwards of SmolLM2, and how well it still predicts text.

Method: "ops": tree_attention (causal) of T tokens behind --prefixes slots, over caches that together exceed the
processor's, both kinds in turn. "forwards": the same for forwards of SmolLM2, a store of each kind. Medians of the
ratios. "quality": SmolLM2 reads --pieces of --length tokens each, of prose and of Python, in one forward each; loss per
token, and how often the likeliest next token is the one that it is with a cache in bf16. Beside measured factors
(`measure_kv_scales`): factors of 1, and the model in fp32, for what rounding to bf16 does by itself.

How to read: "of it" is the time of e4m3 over that of bf16.

Artefacts: reading e4m3 costs arithmetic, which two cores that have a whole memory bus to themselves notice more than
many that share one.

Reference result: bench/results/kv_dtype-*.json, and docs/kernels-figures.md.
"""

from __future__ import annotations

import argparse
import inspect
import tarfile
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch

import facts
from branchwise import KVStore, measure_kv_scales, ops
from branchwise.attention import use_attention
from branchwise.demo import load_smollm2
from branchwise.forward import StoredModel
from branchwise.pages import empty_slots
from needle import sentences

SHAPES = {"SmolLM2": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}  # query heads, KV heads, head dim
TYPES = (torch.bfloat16, torch.float8_e4m3fn)


def in_turn(runs: list[Callable[[], Any]], repeats: int) -> tuple[float, float]:
    """Median seconds of the first, and the median of the second over the first."""
    times = [[facts.seconds(run) for run in runs] for _ in range(repeats + 1)][1:]
    return median(a for a, _ in times), median(b / a for a, b in times)


def time_ops(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for (shape, (Hq, Hkv, D)), P, T in product(SHAPES.items(), options.prefixes, options.nodes):
        lens = torch.tensor([P], dtype=torch.int32)
        query, factor = torch.randn(1, Hq, T, D).bfloat16(), torch.full((Hkv,), 0.02)
        calls = max(2, min(30, 400_000_000 // (P * Hkv * D * 4)))
        some = torch.randn(2, 1, Hkv, P + T, D)
        caches = {}
        for dtype in TYPES:
            like = torch.empty(0, dtype=dtype)
            scale = 0.02 if dtype == torch.float8_e4m3fn else 1.0
            caches[dtype] = [
                [empty_slots(like, cache.shape).copy_(cache / scale) for cache in some] for _ in range(calls)
            ]
        scales = dict(zip(TYPES, ({}, {"key_scale": factor, "value_scale": factor}), strict=True))

        def run(dtype, query=query, lens=lens, caches=caches, scales=scales):
            for keys, values in caches[dtype]:
                ops.tree_attention(query, keys, values, lens, **scales[dtype])

        usual, ratio = in_turn([lambda d=dtype, run=run: run(d) for dtype in TYPES], options.repeats)
        row = {"part": "ops", "shape": shape, "prefix": P, "T": T, "us": round(usual / calls * 1e6, 1)}
        rows.append(row | {"ratio": round(ratio, 3)})
        print(f"{shape} prefix {P} T {T}: {row['us']} us, e4m3 {ratio:.2f} of it", flush=True)
    return rows


def time_forwards(options: argparse.Namespace) -> list[dict[str, Any]]:
    model, rows = load_smollm2(torch.bfloat16)[0], []
    scales = measure_kv_scales(model)
    for P, T in product(options.prefixes, options.nodes):
        g = torch.Generator().manual_seed(0)
        prompt, tokens = (torch.randint(0, 49152, (1, n), generator=g) for n in (P, T))
        targets = [StoredModel(model, KVStore(1, P + T, factors)) for factors in (None, scales)]
        with use_attention(model):
            for target in targets:
                target.extend([prompt[0]])
            positions = torch.arange(P, P + T)[None]
            runs = [lambda t=target, x=tokens, at=positions: t.forward(x, at) for target in targets]
            usual, ratio = in_turn(runs, options.repeats)
        megabytes = [round(target.store.num_bytes / 1e6, 1) for target in targets]
        row = {"part": "forwards", "prefix": P, "T": T, "ms": round(usual * 1e3, 2), "ratio": round(ratio, 3)}
        rows.append(row | {"megabytes": megabytes})
        print(f"SmolLM2 prefix {P} T {T}: {row['ms']} ms, e4m3 {ratio:.2f} of it; {megabytes} MB", flush=True)
    return rows


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows, likeliest = [], {}
    for name, dtype in (("bf16", torch.bfloat16), ("e4m3", None), ("e4m3, factors 1", None), ("fp32", torch.float32)):
        model, tokenizer = load_smollm2(dtype or torch.bfloat16)
        scales = None if dtype is not None else measure_kv_scales(model)
        if name == "e4m3, factors 1":
            scales = [(torch.ones_like(key), torch.ones_like(value)) for key, value in scales]
        for kind, text in (("prose", " ".join(sentences())), ("Python", inspect.getsource(tarfile))):
            ids = tokenizer(text[: 8 * options.pieces * options.length], return_tensors="pt").input_ids[0]
            pieces = ids[: len(ids) // options.length * options.length].view(-1, options.length)[: options.pieces]
            losses, chosen = [], []
            for piece in pieces:
                with use_attention(model):
                    target = StoredModel(model, KVStore(1, options.length, scales))
                    logits = target.forward(piece[None], torch.arange(options.length)[None])[0, :-1].float()
                losses.append(torch.nn.functional.cross_entropy(logits, piece[1:]).item())
                chosen.append(logits.argmax(-1))
            likeliest[name, kind] = torch.cat(chosen)
            same = (likeliest[name, kind] == likeliest["bf16", kind]).float().mean().item()
            row = {"part": "quality", "cache": name, "text": kind, "tokens": likeliest[name, kind].numel()}
            rows.append(row | {"loss": round(sum(losses) / len(losses), 4), "same": round(same, 4)})
            print(f"{name}, {kind}: loss {rows[-1]['loss']:.4f}, {same:.1%} as with bf16", flush=True)
    return rows


PARTS = {"ops": time_ops, "forwards": time_forwards, "quality": quality}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prefixes", nargs="+", type=int, default=[512, 4096, 16384])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--pieces", type=int, default=6)
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    machine = facts.machine()
    print(machine)
    rows = [row for part in options.parts for row in PARTS[part](options)]
    print(f"written to {facts.record('kv_dtype', machine, rows)}")


if __name__ == "__main__":
    main()
