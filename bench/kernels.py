"""tree_attention on the CPU against torch, and against the roofline measured in the same rounds.

Method: B rows with a prefix of P tokens in the cache and T new ones, in every row a random tree given as ancestor bits;
batch "ragged16" is 16 rows with prefixes between P/2 and P. Opponents: SDPA with the whole row's boolean mask, with and
without enable_gqa or repeated KV heads; SDPA without a mask, which is the same computation only for T = 1 and else a
bound; plain softmax(QK')V on repeated heads ("eager"); FlexAttention with --flex (it compiles for every shape). Ours
and the modes without copies run once per round in random order, then those that copy in rounds of their own: handing a
hundred megabytes back to the system slows the next reader of any memory by a millisecond here. Medians. The memory's
bandwidth is that of a sum over 256 MB before and after the rounds of a case, not among them: it evicts code, too.

How to read: "x sdpa" is the time of SDPA's best mode that computes the same, over ours; "x bound" the same for SDPA
without a mask; "x eager" for eager. "roof" is the share of the roofline that ours reaches: the larger of KV bytes over
the bandwidth and flops over torch's matmul rate. "paged" layouts have no opponent; compare them with
the contiguous line above. The plot shows achieved GFLOP/s over arithmetic intensity (flops per KV byte).

Artefacts: keys and values lie in large pages, as in a KVStore, for all opponents. Those that stay in the last-level
cache between rounds pass 100 %. The matmul rates are torch's own and can be passed too. Bandwidth on shared machines
moves by a factor of two within minutes: compare within a line.

Reference result: see the table in docs/kernels-figures.md, and bench/results.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median

import torch
import torch.nn.functional as F

import facts
from branchwise import ops
from branchwise.ops.attention import unpack_mask
from branchwise.pages import empty_slots

SHAPES = {"llama3-8b": (32, 8, 128), "qwen3-0.6b": (16, 8, 128), "smollm2": (9, 3, 64), "gemma3-270m": (4, 1, 256)}
BATCHES = {"1": 1, "4": 4, "ragged16": 16}
STREAM = torch.ones(64 << 20)


def in_slots(values: torch.Tensor) -> torch.Tensor:
    """A copy in memory like a KVStore's."""
    return empty_slots(values, tuple(values.shape)).copy_(values)


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str
    prefix: int
    T: int
    batch: str = "1"
    page_size: int = 0

    @property
    def kv_bytes(self) -> int:
        _, Hkv, D = SHAPES[self.shape]
        return 2 * BATCHES[self.batch] * Hkv * (self.prefix + self.T) * D * getattr(torch, self.dtype).itemsize


class Setup:
    """Tensors of a case."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        (Hq, Hkv, D), B, T, P = SHAPES[case.shape], BATCHES[case.batch], case.T, case.prefix
        self.query = torch.randn(B, Hq, T, D, generator=g).to(dtype)
        self.key, self.value = (in_slots(torch.randn(B, Hkv, P + T, D, generator=g).to(dtype)) for _ in range(2))
        low = P // 2 if case.batch.startswith("ragged") else P
        self.seq_lens = torch.randint(low, P + 1, (B,), generator=g, dtype=torch.int32)
        parents = torch.full((B, T), -1, dtype=torch.int32)
        for i in range(1, T):
            parents[:, i] = torch.randint(max(0, i - 4), i, (B,), generator=g)
        self.bits = ops.build_tree(parents, self.seq_lens)[0]
        self.mask = torch.zeros(B, 1, T, P + T, dtype=torch.bool)
        for b, length in enumerate(self.seq_lens.tolist()):
            self.mask[b, 0, :, :length] = True
            self.mask[b, 0, :, length : length + T] = unpack_mask(self.bits[b], T)
        self.page_table = None
        if case.page_size:
            pages = -(-(P + T) // case.page_size)
            self.page_table = torch.randperm(B * pages, generator=g).int().view(B, pages)
            shape = (B * pages, Hkv, case.page_size, D)
            self.key, self.value = (in_slots(torch.randn(shape, generator=g).to(dtype)) for _ in range(2))

    def ours(self):
        return ops.tree_attention(
            self.query, self.key, self.value, self.seq_lens, self.bits, page_table=self.page_table
        )

    def opponents(self):
        query, key, value, mask = self.query, self.key, self.value, self.mask
        groups = query.shape[1] // key.shape[1]

        def repeated(tensor):
            return tensor.repeat_interleave(groups, 1)

        def eager():
            logits = query @ repeated(key).mT * query.shape[-1] ** -0.5
            return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ repeated(value)

        modes = {
            "mask": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True),
            "mask, repeated kv": lambda: F.scaled_dot_product_attention(query, repeated(key), repeated(value), mask),
            "no mask": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
            "no mask, repeated kv": lambda: F.scaled_dot_product_attention(query, repeated(key), repeated(value)),
        }
        logit_bytes = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        if logit_bytes + groups * (key.nbytes + value.nbytes) < 4 << 30:
            modes["eager"] = eager
        return modes

    def flex(self):
        """FlexAttention on the same mask, compiled."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        B, _, T, S = self.mask.shape
        blocks = create_block_mask(lambda b, h, q, kv: self.mask[b, 0, q, kv], B, None, T, S, device="cpu")
        torch._dynamo.reset()  # after eight shapes it would stop compiling
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(self.query, self.key, self.value, block_mask=blocks, enable_gqa=True)


def measure(case: Case, machine: dict, repeats: int, flex: bool) -> dict:
    setup = Setup(case)
    runs, copying = {"ours": setup.ours}, {}
    if not case.page_size:
        for name, run in setup.opponents().items():
            (copying if name == "eager" or "repeated" in name else runs)[name] = run
        if flex:
            copying["flex"] = setup.flex()
    streams = [facts.seconds(STREAM.sum) for _ in range(3)]
    time = {}
    for some in (runs, copying):
        time |= dict(zip(some, facts.interleaved(list(some.values()), repeats, budget=2.0), strict=True))
    streams += [facts.seconds(STREAM.sum) for _ in range(3)]
    (Hq, Hkv, D), lengths = SHAPES[case.shape], int(setup.seq_lens.sum()) + len(setup.seq_lens) * case.T
    kv_bytes, flops = 2 * lengths * Hkv * D * setup.key.element_size(), 4 * lengths * Hq * case.T * D
    stream_gb_s = STREAM.nbytes / median(streams) / 1e9
    rate = facts.matrix_roof(machine, case.dtype)
    row = asdict(case) | {
        "ours_ms": time["ours"] * 1e3,
        "gb_s": kv_bytes / time["ours"] / 1e9,
        "gflop_s": flops / time["ours"] / 1e9,
        "stream_gb_s": stream_gb_s,
        "intensity": flops / kv_bytes,
        "roof": max(kv_bytes / stream_gb_s, flops / rate) / 1e9 / time["ours"],
    }
    modes = {name: t for name, t in time.items() if name.startswith(("mask", "no mask"))}
    if modes:
        same = {name: t for name, t in modes.items() if (case.T == 1 and case.batch == "1") or name.startswith("mask")}
        row |= {
            "sdpa_ms": min(same.values()) * 1e3,
            "sdpa_mode": min(same, key=same.__getitem__),
            "x_sdpa": min(same.values()) / time["ours"],
            "x_bound": min(t for name, t in modes.items() if name.startswith("no")) / time["ours"],
        }
    row |= {f"x_{name}": time[name] / time["ours"] for name in ("eager", "flex") if name in time}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


HEADER = f"{'shape':11s} {'dtype':8s} {'prefix':>6s} {'T':>3s} {'B':>8s} {'page':>4s} | {'ours ms':>8s} {'GB/s':>5s} "
HEADER += f"{'stream':>6s} {'GF/s':>5s} {'roof':>5s} | {'x sdpa':>7s} {'x bound':>7s} {'x eager':>7s} {'x flex':>6s}"


def line(row: dict) -> str:
    def ratio(key, width=7):
        return f"{row[key]:{width - 1}.2f}x" if key in row else " " * width

    return (
        f"{row['shape']:11s} {row['dtype']:8s} {row['prefix']:6d} {row['T']:3d} {row['batch']:>8s} "
        f"{row['page_size'] or '-':>4} | {row['ours_ms']:8.3f} {row['gb_s']:5.1f} {row['stream_gb_s']:6.1f} "
        f"{row['gflop_s']:5.0f} {row['roof']:5.0%} | {ratio('x_sdpa')} {ratio('x_bound')} {ratio('x_eager')} "
        f"{ratio('x_flex', 6)}"
    )


def plot(rows: list[dict], machine: dict, path) -> None:
    """Achieved GFLOP/s over arithmetic intensity, with the roofline of the run."""
    import matplotlib

    matplotlib.use("Agg")

    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        mine = [row for row in rows if row["dtype"] == dtype and row["page_size"] == 0]
        if not mine:
            continue
        rate = facts.matrix_roof(machine, dtype)
        stream = median(row["stream_gb_s"] for row in mine)
        x = [2.0 ** (e / 8) for e in range(-8, 88)]
        axis.plot(x, [min(rate, stream * i) for i in x], "k-", label=f"roof: {stream:.0f} GB/s, {rate} GFLOP/s")
        for prefix in sorted({row["prefix"] for row in mine}):
            some = [row for row in mine if row["prefix"] == prefix]
            axis.scatter([r["intensity"] for r in some], [r["gflop_s"] for r in some], s=18, label=f"prefix {prefix}")
        axis.set(xscale="log", yscale="log", xlabel="flops per KV byte", title=f"tree_attention, {dtype}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("GFLOP/s")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama3-8b", "smollm2"], choices=SHAPES)
    parser.add_argument("--prefixes", nargs="+", type=int, default=[128, 1024, 4096, 16384])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 256])
    parser.add_argument("--batches", nargs="+", default=["1"], choices=BATCHES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[0], help="0 is contiguous")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention; compiles for seconds per case")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--name", default="kernels", help="of the JSON and the plot under bench/results")
    options = parser.parse_args()
    machine = facts.machine()
    print(machine)
    print(HEADER)
    rows = []
    axes = (options.shapes, options.dtypes, options.batches, options.prefixes, options.tokens, options.page_sizes)
    for shape, dtype, batch, prefix, T, page_size in product(*axes):
        case = Case(shape, dtype, prefix, T, batch, page_size)
        if case.kv_bytes > 2 << 30:  # opponents repeat the heads
            print(f"{shape:11s} {dtype:8s} {prefix:6d} {T:3d} {batch:>8s}: skipped, {case.kv_bytes >> 20} MiB of KV")
            continue
        rows.append(measure(case, machine, options.repeats, options.flex))
        print(line(rows[-1]), flush=True)
    path = facts.record(options.name, machine, rows)
    plot(rows, machine, path.with_suffix(".png"))
    compared = [row for row in rows if "x_sdpa" in row]
    if compared:
        worst = min(compared, key=lambda row: row["x_sdpa"])
        print(f"\nsmallest ratio to SDPA: {line(worst)}")
    print(f"written to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
