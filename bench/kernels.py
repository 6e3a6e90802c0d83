"""tree_attention on the CPU against torch's SDPA, with the roofline measured in the same run.

Method: B rows with a prefix of P tokens in the cache and T new ones. Ours runs with a tree mask (a random tree, given
as ancestor bits). SDPA runs in every mode, each with enable_gqa and with repeated KV heads: with a boolean mask over
the whole row, which is the same computation, and without a mask, which is the same only for T = 1 and else a bound.
Ours and all modes run once per round in random order; medians of --repeats rounds.

How to read: "x sdpa" is the time of SDPA's best mode that computes the same, over ours; "x bound" is the same for SDPA
without a mask, which leaves the tree out; "roof" is the share of the roofline that ours reaches, where the roof is the
larger of bytes / read bandwidth (keys and values once) and flops / matmul rate in that dtype.

Artefacts: caches that fit the last-level cache can exceed the measured memory bandwidth, so "roof" may pass 100 %. The
matmul rate is torch's own; in fp32 it can be below what the cores can do. bf16 runs in fp32 arithmetic so far, so its
compute roof is out of reach for large T. Where cache lines and pages fall matters: single cases vary by 20 % between
processes, and 16384 slots of bf16 have been seen at half the usual speed.

Reference, 2026-11-21, 2 cores of an AMD EPYC (AVX-512, 36-60 GB/s, 200 GFLOP/s fp32, 420 bf16): x sdpa between
1.07 (llama3-8b fp32 prefix 512 T 32) and 16 (llama3-8b bf16 T 1) over 96 cases; x bound at least 0.80.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
import torch.nn.functional as F

import facts
from branchwise import ops

SHAPES = {"llama3-8b": (32, 8, 128), "qwen3-0.6b": (16, 8, 128), "smollm2": (9, 3, 64), "gemma3-270m": (4, 1, 256)}


def sdpa_modes(query, key, value, mask):
    groups = query.shape[1] // key.shape[1]

    def repeated(tensor):
        return tensor.repeat_interleave(groups, 1)

    return {
        "no mask": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "mask": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True),
        "no mask, repeated kv": lambda: F.scaled_dot_product_attention(query, repeated(key), repeated(value)),
        "mask, repeated kv": lambda: F.scaled_dot_product_attention(query, repeated(key), repeated(value), mask),
    }


def measure(shape, dtype, P, T, repeats, seed=0):
    g = torch.Generator().manual_seed(seed)
    Hq, Hkv, D = SHAPES[shape]
    query = torch.randn(1, Hq, T, D, generator=g).to(dtype)
    key, value = (torch.randn(1, Hkv, P + T, D, generator=g).to(dtype) for _ in range(2))
    seq_lens = torch.tensor([P], dtype=torch.int32)
    parents = torch.tensor([[-1, *(int(torch.randint(max(0, i - 4), i, (1,), generator=g)) for i in range(1, T))]])
    bits = ops.build_tree(parents.int(), seq_lens)[0]
    tree = ((bits[0, :, :, None] >> torch.arange(64)) & 1).flatten(1)[:, :T].bool()
    mask = torch.cat([torch.ones(T, P, dtype=torch.bool), tree], 1)[None, None]
    modes = sdpa_modes(query, key, value, mask)
    runs = [lambda: ops.tree_attention(query, key, value, seq_lens, bits), *modes.values()]
    ours, *theirs = facts.interleaved(runs, repeats)
    time = dict(zip(modes, theirs, strict=True))
    comparable = [mode for mode in modes if T == 1 or not mode.startswith("no mask")]
    best = min(comparable, key=time.__getitem__)
    bound = min(time["no mask"], time["no mask, repeated kv"])
    return {
        "shape": shape,
        "dtype": str(dtype)[6:],
        "prefix": P,
        "T": T,
        "ours_ms": ours * 1e3,
        "sdpa_ms": time[best] * 1e3,
        "sdpa_mode": best,
        "ratio": time[best] / ours,
        "bound_ratio": bound / ours,
        "gb_s": 2 * Hkv * (P + T) * D * query.element_size() / ours / 1e9,
        "gflop_s": 4 * Hq * T * (P + T) * D / ours / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama3-8b", "smollm2"], choices=SHAPES)
    parser.add_argument("--prefixes", nargs="+", type=int, default=[512, 2048, 4096, 16384])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    machine = facts.machine()
    print(machine)
    print(
        f"{'shape':12s} {'dtype':9s} {'prefix':>6s} {'T':>3s} | {'ours ms':>8s} {'sdpa ms':>8s} "
        f"{'x sdpa':>6s} {'x bound':>7s} | "
        f"{'GB/s':>5s} {'GF/s':>5s} {'roof':>4s} | best sdpa mode"
    )
    rows = []
    for shape, dtype, P, T in product(options.shapes, options.dtypes, options.prefixes, options.tokens):
        row = measure(shape, getattr(torch, dtype), P, T, options.repeats)
        rate = machine["fp32_gflop_s" if dtype == "float32" else "bf16_gflop_s"]
        row["roof"] = max(row["gb_s"] / machine["read_gb_s"], row["gflop_s"] / rate)
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        print(
            f"{shape:12s} {dtype:9s} {P:6d} {T:3d} | "
            f"{row['ours_ms']:8.3f} {row['sdpa_ms']:8.3f} {row['ratio']:5.2f}x {row['bound_ratio']:6.2f}x | "
            f"{row['gb_s']:5.1f} {row['gflop_s']:5.0f} {row['roof']:4.0%} | {row['sdpa_mode']}",
            flush=True,
        )
    worst = min(rows, key=lambda r: r["ratio"])
    case = f"{worst['shape']} {worst['dtype']} prefix {worst['prefix']} T {worst['T']}"
    print(f"\nsmallest ratio {worst['ratio']:.2f} at {case}")
    print(f"written to {facts.record('kernels', machine, rows)}")


if __name__ == "__main__":
    main()
