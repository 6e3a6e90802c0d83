"""The CUDA ops on a GPU: builds, checks and times them in one command, against torch's attention and the roofline.

    python bench/gpu.py --build --check
    python bench/gpu.py --out results --cases 0 1  # two cases again

Method: every call is captured in a CUDA graph with ROUNDS calls, each on the next of several input sets that together
exceed the L2 cache; a run is the time of one replay by CUDA events, over ROUNDS. Runs of all opponents alternate in
random order; medians. Copy bandwidth (bytes read plus written of a 2 GB copy) and the matmul rate (8192^3 in bf16) are
measured among them.

Opponents: SDPA's flash kernel without a mask, which computes the same for T = 1 and less work than a tree needs for
T > 1 (a bound); SDPA with the boolean mask, by its efficient or cuDNN kernel; FlexAttention with the tree as a block
mask, compiled; FlashInfer's batch decode where it is installed. Those that cannot run a case are left out of it.

Caches in e4m3 are timed against our own kernel on bf16 caches, "bf16". "path" is path_attention, whose bits the tree
does not change; linear layers whose bits the batch does not change are timed against torch's (gpu_linear.py).

How to read: "roof" is the share of the roofline that ours reaches, the larger of KV bytes over the copy bandwidth and
flops over the matmul rate; "x NAME" that opponent's time over ours; "tree cost" the time with ancestor bits over that
of a causal call, less one.

Reference result: none yet; these kernels have not run on hardware.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parent.parent
ROUNDS = 8  # calls per graph


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    prefix: int
    Hq: int = 32
    Hkv: int = 8
    D: int = 128
    page_size: int = 0
    keep: float = 0.0  # part of the pages of 16 slots that sparse_attention is given; 0: tree_attention
    e4m3: bool = False  # the caches

    @property
    def kv_values(self) -> float:
        slots = self.prefix * (self.keep or 1.0) + self.T
        return 2.0 * self.B * self.Hkv * slots * self.D

    @property
    def kv_bytes(self) -> float:
        return self.kv_values * (1 if self.e4m3 else 2)

    @property
    def flops(self) -> float:
        return 2 * self.kv_values * self.T * (self.Hq // self.Hkv)

    def __str__(self) -> str:
        sparse = f" sparse {self.keep:g}" if self.keep else ""
        paged = f" page {self.page_size}" if self.page_size else ""
        return f"B{self.B} T{self.T} P{self.prefix} {self.Hq}/{self.Hkv}x{self.D}{paged}{sparse}{' e4m3' * self.e4m3}"


CASES = [
    *[Case(B, T, P) for B, P in [(1, 65536), (8, 16384), (64, 4096)] for T in (1, 4, 16, 64)],
    *[Case(64, T, 4096, page_size=16) for T in (1, 16)],
    Case(1, 1, 4096),
    Case(1, 16, 4096),
    Case(32, 16, 8192, Hq=16, Hkv=8, D=64),
    Case(32, 16, 8192, Hq=8, Hkv=4, D=256),
    Case(8, 1, 32768, keep=0.0625, page_size=16),
    Case(8, 16, 32768, keep=0.0625, page_size=16),
    Case(1, 2048, 0),
    *[Case(8, T, 16384, e4m3=True) for T in (1, 16)],
]


def build() -> None:
    """Installs branchwise from this tree, for this machine's GPU only."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major == 9 else ''}-real"
    # The emulator as well: tests ask it for the layout of launches.
    defines = ["-Ccmake.define.BRANCHWISE_CUDA=ON", "-Ccmake.define.BRANCHWISE_EMULATE=ON"]
    options = ["--no-build-isolation", "--no-deps", "--break-system-packages", *defines]
    command = [sys.executable, "-m", "pip", "install", "-q", *options]
    begun = time.time()
    subprocess.run([*command, f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={arch}", str(ROOT)], check=True)
    print(f"built for {arch} in {time.time() - begun:.0f} s", flush=True)


def check() -> dict[str, Any]:
    """The GPU tests; their last line."""
    begun = time.time()
    options = ["-q", "-p", "no:cacheprovider", "tests/gpu", "-k", "not emulated", "--maxfail=30"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), flush=True)
    print(f"{lines[-1] if lines else done.stderr[-500:]} ({time.time() - begun:.0f} s)", flush=True)
    return {"rc": done.returncode, "summary": lines[-1] if lines else ""}


def captured(call: Callable[[int], Any]) -> Callable[[], Any]:
    """A replay of ROUNDS calls, call(i) on the i-th input set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(ROUNDS):
            call(i)
    return graph.replay


def milliseconds(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / ROUNDS


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    for run in runs.values():
        milliseconds(run)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(milliseconds(runs[name]))
    return {name: median(values) for name, values in times.items()}


class Inputs:
    """Input sets of one case, as many as exceed the L2 cache."""

    def __init__(self, case: Case) -> None:
        from branchwise import ops

        g = torch.Generator(device="cuda").manual_seed(0)
        B, T, S = case.B, case.T, case.prefix + case.T
        self.case = case
        self.sets = max(1, min(ROUNDS, int(300e6 / max(case.kv_bytes, 1)) + 1))
        draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.query = draw(B, T, case.Hq, case.D).transpose(1, 2)
        self.seq_lens = torch.full((B,), case.prefix, dtype=torch.int32, device="cuda")
        if case.page_size:
            pages = -(-S // case.page_size)
            shape = (B * pages, case.Hkv, case.page_size, case.D)
            self.table = torch.randperm(B * pages, generator=g, device="cuda").int().view(B, pages)
        else:
            shape, self.table = (B, case.Hkv, S, case.D), None
        self.caches = [(draw(*shape), draw(*shape)) for _ in range(self.sets)]
        host = torch.Generator().manual_seed(0)
        parents = torch.full((B, T), -1, dtype=torch.int32)
        for i in range(1, T):
            parents[:, i] = torch.randint(max(0, i - 6), i, (B,), generator=host)
        self.mask = ops.build_tree(parents.cuda(), self.seq_lens)[0] if T > 1 else None
        if case.keep:
            units = case.prefix // 16
            kept = int(units * case.keep)
            lists = torch.rand(B, case.Hkv, units, generator=g, device="cuda").topk(kept, -1).indices
            self.lists = lists.sort(-1).values.int().contiguous()
            self.counts = torch.full((B, case.Hkv), kept, dtype=torch.int32, device="cuda")

    def dense_mask(self) -> torch.Tensor:
        """bool[B, 1, T, S]."""
        case = self.case
        if self.mask is None:
            return torch.ones(case.B, 1, 1, case.prefix + 1, dtype=torch.bool, device="cuda")
        bits = (self.mask[..., None] >> torch.arange(64, device="cuda")) & 1
        tree = bits.flatten(-2)[..., : case.T].bool()
        prefix = torch.ones(case.B, case.T, case.prefix, dtype=torch.bool, device="cuda")
        return torch.cat([prefix, tree], -1)[:, None]


def opponents(inputs: Inputs) -> dict[str, Callable[[int], Any]]:
    """Ours, and what else computes the case or a bound of it."""
    from branchwise import ops

    case, query = inputs.case, inputs.query
    cache = lambda i: inputs.caches[i % inputs.sets]  # noqa: E731
    if case.keep:
        ours = lambda i: ops.sparse_attention(  # noqa: E731
            query,
            *cache(i),
            inputs.seq_lens,
            inputs.lists,
            inputs.counts,
            unit=16,
            tree_mask=inputs.mask,
            page_table=inputs.table,
        )
        return {"ours": ours}
    calls: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: ops.tree_attention(query, *cache(i), inputs.seq_lens, inputs.mask, page_table=inputs.table),
    }
    if case.e4m3:
        eight = [tuple(x.to(torch.float8_e4m3fn) for x in pair) for pair in inputs.caches]
        ones = torch.ones(case.Hkv, device="cuda")
        calls["bf16"] = calls["ours"]
        calls["ours"] = lambda i: ops.tree_attention(
            query, *eight[i % inputs.sets], inputs.seq_lens, inputs.mask, key_scale=ones, value_scale=ones
        )
        return calls
    calls["path"] = lambda i: ops.path_attention(
        query, *cache(i), inputs.seq_lens, inputs.mask, page_table=inputs.table
    )
    if case.T > 1:
        calls["causal"] = lambda i: ops.tree_attention(query, *cache(i), inputs.seq_lens, page_table=inputs.table)
    if inputs.table is not None:
        return calls

    def flash(i: int) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, *cache(i), enable_gqa=True)

    calls["flash, no mask"] = flash
    if case.T > 1 and case.prefix + case.T <= 70_000:
        mask = inputs.dense_mask()
        repeats = case.Hq // case.Hkv

        def masked(i: int) -> Any:
            key, value = (x.repeat_interleave(repeats, 1) for x in cache(i))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

        calls["sdpa, mask"] = masked
        calls["flex"] = flex_call(inputs, mask)
    if case.T == 1 and importlib.util.find_spec("flashinfer") is not None:
        calls["flashinfer"] = flashinfer_call(inputs)
    return calls


def flex_call(inputs: Inputs, mask: torch.Tensor) -> Callable[[int], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = inputs.case
    sees = mask[:, 0]
    blocks = create_block_mask(
        lambda b, h, q, k: sees[b, q, k], case.B, None, case.T, case.prefix + case.T, device="cuda"
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda i: compiled(inputs.query, *inputs.caches[i % inputs.sets], block_mask=blocks, enable_gqa=True)


def flashinfer_call(inputs: Inputs) -> Callable[[int], Any]:
    import flashinfer

    case = inputs.case
    S = case.prefix + 1
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "HND"
    )
    page = 16
    pages = S // page

    def paged(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, : pages * page].unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1).contiguous()

    caches = [tuple(paged(x) for x in pair) for pair in inputs.caches]
    starts = torch.arange(case.B + 1, dtype=torch.int32, device="cuda") * pages
    index = torch.arange(case.B * pages, dtype=torch.int32, device="cuda")
    last = torch.full((case.B,), page, dtype=torch.int32, device="cuda")
    wrapper.plan(starts, index, last, case.Hq, case.Hkv, case.D, page, q_data_type=torch.bfloat16)
    query = inputs.query[:, :, 0].contiguous()
    return lambda i: wrapper.run(query, caches[i % inputs.sets])


def ceilings() -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return lambda i: target.copy_(source), lambda i: a @ a


def attention_row(case: Case, repeats: int) -> dict[str, Any]:
    inputs = Inputs(case)
    copy, product = ceilings()
    runs = {"copy": captured(copy), "matmul": captured(product)}
    skipped: dict[str, str] = {}
    for name, call in opponents(inputs).items():
        try:
            runs[name] = captured(call)
        except Exception as error:  # only an opponent may fail
            if name in ("ours", "causal", "path"):
                raise
            skipped[name] = str(error).splitlines()[0][:120]
    ms = interleaved(runs, repeats)
    bandwidth, rate = 2 * (1 << 30) / ms["copy"] / 1e6, 2 * 8192**3 / ms["matmul"] / 1e9  # GB/s, TFLOP/s
    floor = max(case.kv_bytes / bandwidth / 1e6, case.flops / rate / 1e9)
    row = {"case": str(case), **asdict(case), "ms": {k: round(v, 5) for k, v in ms.items()}, "skipped": skipped}
    row |= {"copy_gb_s": round(bandwidth), "matmul_tflop_s": round(rate), "roof": round(floor / ms["ours"], 3)}
    if "causal" in ms:
        row["tree_cost"] = round(ms["ours"] / ms["causal"] - 1, 3)
    ratios = {
        name: round(t / ms["ours"], 2) for name, t in ms.items() if name not in ("ours", "causal", "copy", "matmul")
    }
    row["x"] = ratios
    others = "  ".join(f"x {name} {ratio:.2f}" for name, ratio in ratios.items())
    cost = f"  tree cost {row['tree_cost']:+.1%}" if "tree_cost" in row else ""
    print(f"{case!s:42} {ms['ours']:8.4f} ms  roof {row['roof']:.0%}{cost}  {others}", flush=True)
    return row


def verify_rows(repeats: int) -> list[dict[str, Any]]:
    """64 trees of 64 nodes over 152k tokens, drafts that are accepted for about three levels."""
    from branchwise import ops

    B, T, V = 64, 64, 152_064
    host = torch.Generator().manual_seed(0)
    parents = torch.full((B, T), -1, dtype=torch.int32)
    for i in range(1, T):
        parents[:, i] = max(0, (i - 1) // 3)
    logits = torch.randn(B, T, V, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randint(0, V, (B, T), generator=host).cuda()
    best = logits.argmax(-1)
    for i in range(1, T):
        if i % 3 == 1 and i < 40:
            tokens[:, i] = best[torch.arange(B), int(parents[0, i])]
    _, _, child, sibling = ops.build_tree(parents.cuda(), torch.zeros(B, dtype=torch.int32, device="cuda"))
    uniforms = torch.rand(B, T, 2, device="cuda")
    copy, _ = ceilings()
    calls = {
        "copy": copy,
        "greedy": lambda i: ops.verify_greedy(tokens, child, sibling, logits),
        "match": lambda i: ops.verify_sample(tokens, child, sibling, logits, uniforms, "match", temperature=0.1),
        "torch argmax": lambda i: logits.argmax(-1),
    }
    visited = {
        "greedy": int(ops.verify_greedy(tokens, child, sibling, logits)[1].sum()),
        "match": int(ops.verify_sample(tokens, child, sibling, logits, uniforms, "match", temperature=0.1)[1].sum()),
    }
    ms = interleaved({name: captured(call) for name, call in calls.items()}, repeats)
    bandwidth = 2 * (1 << 30) / ms["copy"] / 1e6
    rows = []
    for name, nodes in visited.items():
        floor = nodes * V * 2 / bandwidth / 1e6
        rows.append(
            {"op": name, "nodes_read": nodes, "ms": ms[name], "floor_ms": floor, "argmax_ms": ms["torch argmax"]}
        )
        print(
            f"verify {name}: {ms[name]:.4f} ms, {ms[name] / floor:.2f} times the {nodes} nodes that it reads; "
            f"torch's argmax of all 4096: {ms['torch argmax']:.4f} ms",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="install branchwise from this tree first")
    parser.add_argument("--check", action="store_true", help="run the GPU tests first")
    parser.add_argument("--cases", type=int, nargs="+", help="indices of the table; default: all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=32, help="of the model that decodes (gpu_decode.py); 0: none")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of the JSON record")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA device")
    if args.build:
        build()  # before the first import of branchwise
    record: dict[str, Any] = {"date": date.today().isoformat(), "device": torch.cuda.get_device_name()}
    record |= {"torch": torch.__version__, "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count}
    if args.check:
        record["check"] = check()
    rows: list[dict[str, Any]] = []
    for i in args.cases if args.cases is not None else range(len(CASES)):
        try:
            rows.append(attention_row(CASES[i], args.repeats))
        except Exception as error:
            rows.append({"case": str(CASES[i]), "error": str(error)[:300]})
            print(f"{CASES[i]}: {error}", flush=True)
        torch.cuda.empty_cache()
    record["attention"] = rows
    record["verify"] = verify_rows(args.repeats)
    from gpu_linear import linear_rows

    record["linear"] = linear_rows(args.repeats)
    if args.layers > 0:
        from gpu_decode import decode_rows

        torch.cuda.empty_cache()
        record["decode"] = decode_rows(args.layers)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
