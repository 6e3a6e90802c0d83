"""invariant_linear on a GPU, against torch's linear and the roofline; part of bench/gpu.py.

Shapes are those of Llama-3-8B's layers in bf16. Weights of a call are those of the next of several sets, which together
exceed the L2 cache. "roof" is the share of the roofline that ours reaches, "x torch" torch's time over ours.

Reference result: none yet; this op has not run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu import captured, ceilings, interleaved

SHAPES = {"qkv": (4096, 6144), "up": (4096, 14336), "down": (14336, 4096)}
ROWS = (1, 16, 64, 1024)


def opponents(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> dict[str, Callable[[int], Any]]:
    from branchwise import ops

    copy, product = ceilings()
    return {
        "copy": copy,
        "matmul": product,
        "ours": lambda i: ops.invariant_linear(x, weights[i % len(weights)]),
        "torch": lambda i: torch.nn.functional.linear(x, weights[i % len(weights)]),
    }


def linear_rows(repeats: int) -> list[dict[str, Any]]:
    """A row per layer and number of rows."""
    results = []
    for name, (K, N) in SHAPES.items():
        weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        for M in ROWS:
            x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
            ms = interleaved({name: captured(call) for name, call in opponents(x, weights).items()}, repeats)
            bandwidth, rate = 2 * (1 << 30) / ms["copy"], 2 * 8192**3 / ms["matmul"]  # per ms
            floor = max(2 * (N * K + M * (N + K)) / bandwidth, 2 * M * N * K / rate)
            row = {"layer": name, "rows": M, "ms": ms["ours"], "roof": floor / ms["ours"]}
            row["x torch"] = ms["torch"] / ms["ours"]
            results.append(row)
            print(
                f"linear {name} {M:5} rows: {ms['ours']:.4f} ms  roof {row['roof']:.0%}  x torch {row['x torch']:.2f}",
                flush=True,
            )
    return results
