"""Decode speed on SmolLM2-135M: plain `generate`, transformers' prompt lookup, and TreeSpeculation.

Method: for every prompt of six kinds (bench/prompts.py), the decoders run in turn in one process, each with
--max-new-tokens greedy tokens; that is repeated --repeats times and medians are taken per prompt. "cold" is a new
TreeSpeculation() per prompt, or one with the drafter of --drafter (empty; what a forward costs was learned on the
prompts before, as in any running process); "warm" asks the same prompt again. Decode speed counts tokens after the
first, from the moment the first one arrived, so that the prompt's forward, which is the same for all, does not dilute
the ratios; total speed has it in. In bf16 two correct decoders may emit different texts; speed is tokens over seconds
of each one's own text.

How to read: "x plain" is the ratio of decode speeds, kind by kind as the ratio of summed times per token; "t/fwd" is
tokens per forward; "same" counts prompts whose text equals plain generate's; "gap" is the largest logit by which plain
generate would have preferred another token anywhere in our text (0 in fp32; near-ties in bf16).

Artefacts: two shared cores make single runs vary by 10 % and more; ratios of medians vary by a few per cent.

Reference, 2026-11-23, 2 cores of an AMD EPYC (AVX-512-BF16), torch 2.13, transformers 5.23, "auto", decode speed over
plain, prompt lookup / cold / warm: fp32 code 1.01/1.24/8.1, math 0.88/1.34/7.6, edit 2.36/3.15/9.1, summary
0.95/1.26/8.5, structured 1.97/2.33/9.0, chat 0.89/1.03/8.9; bf16 code 1.38/1.56/12.3, math 1.52/2.24/14.5, edit
3.75/6.42/16.4, summary 1.32/1.48/11.8, structured 2.73/3.30/12.6, chat 1.11/1.22/14.0. Largest gap in bf16: 0.25. The
same in bf16 before decoding was deterministic there: decode-bfloat16-2026-11-23a.json in bench/results/; with --drafter
trie two days before: decode-*-2026-11-21.json.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from statistics import median
from typing import Any

import torch

import branchwise as bw
import facts
import prompts
from branchwise.demo import load_smollm2
from branchwise.report import greedy_gaps


class Clock:
    """A streamer that notes when the first token arrived."""

    def __init__(self) -> None:
        self.calls, self.first = 0, 0.0

    def put(self, tokens: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call is the prompt
            self.first = time.perf_counter()

    def end(self) -> None: ...


def timed(model: Any, inputs: Any, new_tokens: int, **options: Any) -> tuple[torch.Tensor, float, float]:
    """Text, seconds after the first token, seconds in all."""
    clock = Clock()
    begun = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, **options)
    end = time.perf_counter()
    return out, end - clock.first, end - begun


def measure(
    model: Any, tokenizer: Any, prompt: str, drafter: str, new_tokens: int, repeats: int
) -> dict[str, dict[str, Any]]:
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(repeats):
        spec = bw.TreeSpeculation(drafter)
        for name, options in (
            ("plain", {}),
            ("prompt lookup", {"prompt_lookup_num_tokens": 10}),
            ("cold", {"custom_generate": spec}),
            ("warm", {"custom_generate": spec}),
        ):
            out, decode, total = timed(model, inputs, new_tokens, **options)
            count = out.shape[1] - length
            runs[name].append({"text": out, "tokens": count, "decode": decode, "total": total, "stats": spec.stats})
    result = {}
    for name, samples in runs.items():
        last = samples[-1]
        result[name] = {
            "tokens": last["tokens"],
            "decode": median(s["decode"] / max(s["tokens"] - 1, 1) for s in samples),
            "total": median(s["total"] / s["tokens"] for s in samples),
            "same": torch.equal(last["text"], runs["plain"][-1]["text"]),
        }
        if name in ("cold", "warm"):
            # spec.stats is replaced by every call, so each sample kept the one of its own call.
            result[name]["tokens_per_forward"] = last["stats"].tokens_per_forward
            result[name]["gap"] = float(greedy_gaps(model, last["text"], length).max())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--held-out", action="store_true", help="prompts that the trie's defaults were not tuned on")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    kinds = prompts.held_out() if options.held_out else prompts.by_kind()
    series = "decode-held-out" if options.held_out else "decode"
    series += "" if options.drafter == "auto" else f"-{options.drafter}"
    machine = facts.machine() | {"drafter": options.drafter}
    print(machine)
    for dtype in options.dtypes:
        rows = []
        model, tokenizer = load_smollm2(getattr(torch, dtype))
        warm_up = tokenizer(prompts.open_chat()[0], return_tensors="pt")
        for custom in ({}, {"custom_generate": bw.TreeSpeculation()}):
            timed(model, warm_up, 24, **custom)
        print(
            f"\n{dtype:10s} {'plain t/s':>9s} | {'lookup':>7s} | {'cold':>7s} {'t/fwd':>5s} {'same':>4s} {'gap':>5s} | "
            f"{'warm':>7s}   (x plain, decode)"
        )
        for kind, texts in kinds.items():
            results = [
                measure(model, tokenizer, text, options.drafter, options.max_new_tokens, options.repeats)
                for text in texts
            ]
            mean = {
                key: {name: sum(r[name][key] for r in results) / len(results) for name in results[0]}
                for key in ("decode", "total")
            }
            row = {
                "dtype": dtype,
                "kind": kind,
                "prompts": len(texts),
                "plain_tokens_per_s": round(1 / mean["decode"]["plain"], 2),
                "tokens_per_forward": round(sum(r["cold"]["tokens_per_forward"] for r in results) / len(results), 3),
                "same": sum(r["cold"]["same"] for r in results),
                "max_gap": round(max(r[name]["gap"] for r in results for name in ("cold", "warm")), 4),
            }
            for name in ("prompt lookup", "cold", "warm"):
                for key in ("decode", "total"):
                    row[f"{name.replace(' ', '_')}_{key}_ratio"] = round(mean[key]["plain"] / mean[key][name], 3)
            rows.append(row)
            print(
                f"{kind:10s} {row['plain_tokens_per_s']:9.1f} | {row['prompt_lookup_decode_ratio']:6.2f}x | "
                f"{row['cold_decode_ratio']:6.2f}x {row['tokens_per_forward']:5.2f} {row['same']:3d}/{len(texts)} "
                f"{row['max_gap']:5.2f} | {row['warm_decode_ratio']:6.2f}x",
                flush=True,
            )
        print(f"written to {facts.record(f'{series}-{dtype}', machine, rows)}", flush=True)


if __name__ == "__main__":
    main()
