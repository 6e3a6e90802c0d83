"""invariant_linear on the CPU against torch's linear layers, and against the roofline measured in the same rounds.

Method: the seven matrices of a decoder layer, in as many copies as make 256 MB, so that weights come from memory as
they do while decoding; M rows go through all of them. Contestants take turns within a round: torch.nn.functional.linear
as models call it; with weights packed beforehand by oneDNN for so many rows, as torch.compile's freezing has them
("packed": a second copy of the weights, fp32, and bf16 where oneDNN has it); and ours. The memory's bandwidth is that
of a sum over 256 MB after every round. Medians of the rounds' ratios.

How to read: "x torch" and "x packed" are their time over ours; "stream" is the time of reading the weights once, over
ours. torch's rows have bits that depend on their number, ours do not.

Artefacts: weights partly stay in a large last-level cache between rounds. Bandwidth on shared machines moves within
minutes: compare within a line.

Reference results: docs/kernels-figures.md, and bench/results/linear-*.json.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from statistics import median

import torch
import torch.nn.functional as F

import facts
from branchwise import ops

#: [(K, N), ...] of a decoder layer.
LAYERS = {
    "smollm2": [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)],
    "llama3-8b": [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)],
}
LEAST_BYTES = 256 << 20
STREAM = torch.ones(64 << 20)


def seconds(run) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


@torch.inference_mode()
def measure(shape: str, dtype: torch.dtype, M: int, repeats: int) -> dict[str, float]:
    sizes = LAYERS[shape]
    layer_bytes = sum(K * N for K, N in sizes) * dtype.itemsize
    sizes = sizes * -(-LEAST_BYTES // layer_bytes)
    x = {K: torch.randn(M, K).to(dtype) for K, _ in sizes}
    weights = [torch.randn(N, K).to(dtype) for K, N in sizes]

    def through(op, weights):
        return lambda: [op(x[K], weight) for (K, _), weight in zip(sizes, weights, strict=True)]

    runs = {"ours": through(ops.invariant_linear, weights), "torch": through(F.linear, weights)}
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, M) for weight in weights]
        pointwise = torch.ops.mkldnn._linear_pointwise
        runs["packed"] = through(lambda x, weight: pointwise(x, weight, None, "none", [], ""), packed)
    for run in runs.values():
        run()
    taken = [
        {name: seconds(run) for name, run in runs.items()} | {"stream": seconds(STREAM.sum)} for _ in range(repeats)
    ]
    row = {"ms": median(round_["ours"] for round_ in taken) * 1e3}
    row |= {f"x_{name}": median(r[name] / r["ours"] for r in taken) for name in runs if name != "ours"}
    share = sum(weight.nbytes for weight in weights) / STREAM.nbytes
    return row | {"stream": median(share * r["stream"] / r["ours"] for r in taken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 32, 64, 128, 512])
    parser.add_argument("--isa", default=ops.cpu_isa()[0], help="of ours; torch's is set by ONEDNN_MAX_CPU_ISA")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    ops.set_cpu_isa(options.isa)
    machine, rows = facts.machine(), []
    print(machine)
    for shape, dtype, M in product(options.shapes, options.dtypes, options.rows):
        row = measure(shape, getattr(torch, dtype), M, options.repeats)
        row = {"shape": shape, "dtype": dtype, "M": M} | {key: round(value, 3) for key, value in row.items()}
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(f"written to {facts.record(f'linear-{options.isa}', machine, rows)}")


if __name__ == "__main__":
    main()
