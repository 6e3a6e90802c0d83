"""One decode step of SmolLM2: where its time goes, and how it compares with plain transformers.

Method: a cache of --prefixes random tokens; then one forward of T new tokens, again and again over the same prefix.
Plain: the model with SDPA and transformers' DynamicCache, cropped back after every step. Ours: the same model with
branchwise's attention and KVStore, whose lengths are simply not advanced. Interleaved, medians.

How to read: the table gives milliseconds per step and the ratio; below it, for ours, the share of the operators that
take most of the CPU time (torch.profiler, self time, all threads of an operator in the one that called it).

Artefacts: the profiler adds microseconds per operator, so that its total exceeds the step that was timed without it.

Reference result: see docs/kernels-figures.md.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
import transformers as tf
from torch.profiler import ProfilerActivity, profile

import facts
from branchwise import KVStore
from branchwise.attention import use_attention
from branchwise.cache import CACHE_NAME
from branchwise.demo import load_smollm2
from branchwise.forward import StoredModel


class Step:
    def __init__(self, model, P: int, T: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.model, self.P = model, P
        prompt = torch.randint(0, 49152, (1, P), generator=g)
        self.tokens = torch.randint(0, 49152, (1, T), generator=g)
        self.positions = torch.arange(P, P + T)[None]
        self.cache = tf.DynamicCache()
        model(prompt, **{CACHE_NAME: self.cache}, logits_to_keep=1)
        self.target = StoredModel(model, KVStore(1, P + T))
        with use_attention(model):
            self.target.extend([prompt[0]])

    def plain(self):
        logits = self.model(self.tokens, **{CACHE_NAME: self.cache}).logits
        self.cache.crop(-self.tokens.shape[1])
        return logits

    def ours(self):
        with use_attention(self.model):
            return self.target.forward(self.tokens, self.positions)


def breakdown(run, top: int = 8) -> list[tuple[str, float]]:
    """Operators by share of the self CPU time."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(3):
            run()
    events = prof.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    ranked = sorted(events, key=lambda event: -event.self_cpu_time_total)[:top]
    return [(event.key, event.self_cpu_time_total / total) for event in ranked]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    machine, rows = facts.machine(), []
    print(machine)
    for dtype, P, T in product(options.dtypes, options.prefixes, options.tokens):
        step = Step(load_smollm2(getattr(torch, dtype))[0], P, T)
        gap = (step.ours().float() - step.plain().float()).abs().max().item()
        ours, plain = facts.interleaved([step.ours, step.plain], options.repeats)
        shares = breakdown(step.ours)
        rows.append(
            {
                "dtype": dtype,
                "prefix": P,
                "T": T,
                "ours_ms": round(ours * 1e3, 2),
                "plain_ms": round(plain * 1e3, 2),
                "ratio": round(plain / ours, 2),
                "largest_logit_gap": round(gap, 5),
                "shares": {name: round(share, 3) for name, share in shares},
            }
        )
        print(f"{dtype} prefix {P} T {T}: ours {ours * 1e3:.1f} ms, plain {plain * 1e3:.1f} ms, {plain / ours:.2f}x")
        print("   " + ", ".join(f"{name} {share:.0%}" for name, share in shares), flush=True)
    print(f"written to {facts.record('decode_step', machine, rows)}")


if __name__ == "__main__":
    main()
