"""n continuations of one long prompt: bytes of keys and values and time per step, beside transformers' own sampling
loop with num_return_sequences = n, at equal output. SmolLM2.

Method: `bw.BestOfN` writes n continuations over a KV tree; transformers' `_sample` runs the same n rows with the same
noise (`bw.PositionKeyedSampler`) over a DynamicCache. The prompt is run once for both sides, outside the time, and the
peer gets its cache repeated n times; with `generate(num_return_sequences=n)` it would run the prompt n times
("prompt x n" in the table, measured up to --prompt-rows rows). A step is one token for each of the n rows; runs of
both sides alternate, and medians of all steps count.

How to read: "KV MB" is what the continuations hold at the end; "of least" compares it with the bytes of the prompt
once plus every tail. "ratio" is the peer's step time over ours. "equal" is the share of rows whose tokens are all the
same on both sides, "equal tokens" how far they are so on average: all in fp32, up to draws that fall on a boundary
within rounding; in bf16 roundings are larger, and texts part now and then.

Reference results: bench/results/search-*.json, and docs/search.md.
"""

from __future__ import annotations

import argparse
import copy
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import branchwise as bw
import facts
from branchwise.cache import CACHE_NAME
from branchwise.demo import load_smollm2
from needle import sentences


class Steps(bw.Monitor):
    """Notes when every round ended."""

    def begin(self, most: int) -> None:
        super().begin(most)
        self.times: list[float] = []

    def advance(self, tokens: int) -> None:
        self.times.append(time.perf_counter())


class StepTimes:
    """The same as a stopping criterion, which never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def gaps(times: list[float]) -> list[float]:
    """Seconds between rounds, without the first ones, which find nothing warm."""
    return [b - a for a, b in pairwise(times[1:])]


def bytes_of(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def run_peer(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, n: int, options: dict) -> tuple:
    rows = copy.deepcopy(cache)
    rows.batch_repeat_interleave(n)
    steps = StepTimes()
    out = model.generate(
        ids.expand(n, -1),
        **{CACHE_NAME: rows},
        custom_generate=bw.PositionKeyedSampler(seed=0),
        stopping_criteria=[steps],
        **options,
    )
    return out[:, ids.shape[1] :], gaps(steps.times), bytes_of(rows)


def run_ours(model: PreTrainedModel, ids: torch.Tensor, n: int, options: dict) -> tuple:
    search = bw.BestOfN(n, lambda prompt, texts: [-float(i) for i in range(len(texts))], seed=0, monitor=Steps(False))
    model.generate(ids, custom_generate=search, **options)
    return torch.stack(search.found[0].texts), gaps(search.monitor.times), search.found[0].peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--prompt-rows", type=int, default=16, help="most rows for which transformers runs the prompt")
    args = parser.parse_args()

    model, tokenizer = load_smollm2(getattr(torch, args.dtype))
    ids = tokenizer(" ".join(sentences()), return_tensors="pt").input_ids[:, : args.prompt]
    options = {"max_new_tokens": args.new, "do_sample": True, "temperature": 0.8, "top_k": 50, "eos_token_id": None}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        begun = time.perf_counter()
        model(ids[:, :-1], **{CACHE_NAME: cache}, logits_to_keep=1)
        print(f"prompt once, transformers: {time.perf_counter() - begun:.1f} s", flush=True)
    per_token = bytes_of(cache) / (args.prompt - 1)
    rows = []
    for n in args.rows:
        ours: list[float] = []
        peer: list[float] = []
        for _ in range(args.repeats):
            texts, steps, held = run_ours(model, ids, n, options)
            ours += steps
            theirs, steps, peer_held = run_peer(model, ids, cache, n, options)
            peer += steps
        prompt_seconds = None
        if n <= args.prompt_rows:
            with torch.no_grad():
                prompt_seconds = facts.seconds(
                    lambda n=n: model(
                        ids.expand(n, -1), **{CACHE_NAME: DynamicCache(config=model.config)}, logits_to_keep=1
                    )
                )
        least = per_token * (args.prompt + n * (args.new - 1))
        rows.append(
            {
                "n": n,
                "ms per step": round(median(ours) * 1e3, 1),
                "transformers": round(median(peer) * 1e3, 1),
                "ratio": round(median(peer) / median(ours), 2),
                "KV MB": round(held / 1e6, 1),
                "of least": round(held / least, 3),
                "transformers KV MB": round(peer_held / 1e6, 1),
                "prompt x n, s": None if prompt_seconds is None else round(prompt_seconds, 1),
                "equal": float((texts == theirs).all(1).float().mean()),
                "equal tokens": round(float((texts == theirs).long().cumprod(1).sum(1).float().mean()), 1),
            }
        )
        print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    print(facts.record("search", facts.machine() | vars(args), rows))


if __name__ == "__main__":
    main()
