"""Machine facts, timing and JSON records shared by the benchmarks."""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

import branchwise
from branchwise import ops

RESULTS = Path(__file__).parent / "results"


def seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def interleaved(runs: Sequence[Callable[[], Any]], repeats: int, budget: float = 60.0) -> list[float]:
    """Median seconds of each, one of each per round, after one warm-up.

    The order is drawn anew in every round: what ran before decides what lies in the caches. Fewer rounds than
    ``repeats``, but at least three, where they would take more than ``budget`` seconds.
    """
    order = random.Random(0)
    round_seconds = sum(seconds(run) for run in runs) + 1e-9
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(max(3, min(repeats, int(budget / round_seconds)))):
        for i in order.sample(range(len(runs)), len(runs)):
            torch.zeros(1 << 18)  # what one run gave back to the system, the next would wait for: up to 3 ms
            times[i].append(seconds(runs[i]))
    return [median(column) for column in times]


def read_bandwidth() -> float:
    """GB/s of a sum over 256 MB, the best of five."""
    data = torch.ones(64 << 20)
    return data.nbytes / min(seconds(data.sum) for _ in range(5)) / 1e9


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of 2048 x 2048 matrices, the best of five; of 256 x 256 where torch has only a loop for them
    (bf16 on a CPU without AVX-512), which would take minutes."""
    for size in (256, 2048):
        a = torch.randn(size, size).to(dtype)
        rate = 2 * size**3 / min(seconds(lambda a=a: a @ a) for _ in range(5)) / 1e9
        if rate < 5:
            break
    return rate


def machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "date": date.today().isoformat(),
        "cpu": model,
        "isa": ops.cpu_isa()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "branchwise": branchwise.__version__,
        "read_gb_s": round(read_bandwidth(), 1),
        "fp32_gflop_s": round(matmul_rate(torch.float32)),
        "bf16_gflop_s": round(matmul_rate(torch.bfloat16)),
    }


def matrix_roof(machine: dict[str, Any], dtype: str) -> float:
    """GFLOP/s that a kernel for a dtype is held to: torch's rate, or that of fp32 where bf16 is slower."""
    return max(machine["fp32_gflop_s"], machine["bf16_gflop_s"] if dtype != "float32" else 0)


def record(name: str, facts: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes bench/results/<name>-<date>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{facts['date']}.json"
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    path.write_text(f'{{\n  "machine": {json.dumps(facts)},\n  "rows": [\n    {lines}\n  ]\n}}\n')
    return path
