"""What sparse attention costs: reading lists against reading everything, and a decode step's attention under Quest and
DELTA against our own dense kernel. Llama-3-8B shapes: 32 query heads, 8 KV heads, head dim 128; bf16, one row.

Method: `lists` calls sparse_attention on random ascending lists per KV head, on the caches of several layers in turn,
so that nothing is found in a cache; the memory's bandwidth is that of a sum over 256 MB, measured between the rounds.
`step` runs the attention of a stack of layers for one token through the policy's own session (summaries, scores,
selection and attention; for DELTA the sparse layers and the planner by themselves), dense and sparse layers in turn.
Medians.

How to read: "GB/s" counts the keys and values of the listed tokens, "of stream" divides by the bandwidth. "x dense" is
the dense kernel's time over the policy's.

Artefacts: bandwidth on shared machines moves by a factor of two within minutes: compare within a line.

Reference results: bench/results/sparse-*.json, and docs/kv.md.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch

import facts
from branchwise import KVStore, kv, ops
from branchwise.attention import AttentionPlan, LayerCall
from branchwise.pages import empty_slots

HQ, HKV, D = 32, 8, 128


def slots(like: torch.Tensor, S: int) -> torch.Tensor:
    return empty_slots(like, (1, HKV, S + 64, D)).normal_()


def lists(S: int, budgets: list[int], units: list[int], layers: int, repeats: int) -> list[dict[str, Any]]:
    like = torch.empty(0, dtype=torch.bfloat16)
    caches = [(slots(like, S), slots(like, S)) for _ in range(layers)]
    query = torch.randn(1, HQ, 1, D).bfloat16()
    lens = torch.tensor([S], dtype=torch.int32)
    stream = torch.ones(64 << 20)
    rows = []
    for budget in budgets:
        for unit in units:
            times: dict[str, list[float]] = {"sparse": [], "dense": [], "stream": []}
            for _ in range(repeats):
                times["stream"].append(facts.seconds(stream.sum))
                for keys, values in caches:
                    chosen = [torch.randperm(S // unit)[: budget // unit].sort().values for _ in range(HKV)]
                    indices = torch.stack(chosen).int()[None]
                    counts = torch.full((1, HKV), budget // unit, dtype=torch.int32)
                    call = (query, keys, values, lens, indices, counts)
                    times["sparse"].append(facts.seconds(lambda c=call, u=unit: ops.sparse_attention(*c, unit=u)))
                keys, values = caches[0]
                times["dense"].append(facts.seconds(lambda k=keys, v=values: ops.tree_attention(query, k, v, lens)))
            ms = {name: median(column) * 1e3 for name, column in times.items()}
            read, bandwidth = 4 * HKV * D * budget / ms["sparse"] / 1e6, stream.nbytes / ms["stream"] / 1e6
            row = {
                "bench": "lists",
                "prefix": S,
                "budget": budget,
                "unit": unit,
                "ms": round(ms["sparse"], 3),
                "gb_s": round(read, 1),
                "stream_gb_s": round(bandwidth, 1),
                "of_stream": round(read / bandwidth, 2),
                "dense_of_stream": round(4 * HKV * D * S / ms["dense"] / 1e6 / bandwidth, 2),
                "x_dense": round(ms["dense"] / ms["sparse"], 1),
            }
            rows.append(row)
            print(
                f"{budget:6} tokens, unit {unit:3}: {row['ms']:7.3f} ms {row['gb_s']:5.1f} GB/s "
                f"{row['of_stream']:5.2f} of stream (dense {row['dense_of_stream']:.2f}), {row['x_dense']:.1f}x dense",
                flush=True,
            )
    return rows


def step(S: int, layers: int, repeats: int) -> list[dict[str, Any]]:
    store = KVStore(1, S + 64)
    like = torch.empty(0, dtype=torch.bfloat16)
    for index in range(layers):
        layer = store.layer(index)
        layer.keys, layer.values, layer.is_initialized = slots(like, S), slots(like, S), True
    store.capacity = S + 64
    store.set_lengths(torch.tensor([S], dtype=torch.int32))
    plan = AttentionPlan(store.seq_lens, None, torch.tensor([[S]]), store=store)

    class Model:  # what sessions look at
        class config:
            num_hidden_layers = layers

            @classmethod
            def get_text_config(cls):
                return cls

    def call(index: int) -> LayerCall:
        layer, query = store.layers[index], torch.randn(1, HQ, 1, D).bfloat16()
        return LayerCall(index, query, plan, layer.keys, layer.values, None, 0, None, 0.0, store.seq_lens, None)

    def per_layer(run: Any) -> list[float]:
        return [facts.seconds(lambda i=index: run(call(i))) for index in range(layers)]

    rows = []
    for budget, page_size in ((1024, 16), (2048, 16), (2048, 32), (4096, 16)):
        options = dict(page_size=page_size, dense_layers=0, recent=32, min_length=0)
        quest = kv.Quest(budget, **options).begin(Model, store)
        eight = kv.Quest(budget, **options, summary_dtype=torch.float8_e4m3fn).begin(Model, store)
        delta = kv.DELTA(budget, [0], warm_up=0, page_size=page_size, recent=128, min_length=0).begin(Model, store)
        for session in (quest, eight):
            per_layer(session.attend)  # builds the summaries
        times: dict[str, list[float]] = {"dense": [], "quest": [], "quest_e4m3": [], "delta": [], "planner": []}
        for _ in range(repeats):
            times["dense"] += per_layer(lambda c: c.dense())
            times["quest"] += per_layer(quest.attend)
            times["quest_e4m3"] += per_layer(eight.attend)
            times["planner"].append(facts.seconds(lambda d=delta: d.attend(call(0))))
            times["delta"] += per_layer(delta.attend)[1:]
        ms = {name: median(column) * 1e3 for name, column in times.items()}
        row = {"bench": "step", "prefix": S, "budget": budget, "page_size": page_size}
        row |= {f"{name}_ms": round(value, 3) for name, value in ms.items()}
        row |= {f"{name}_x": round(ms["dense"] / ms[name], 2) for name in list(times)[1:]}
        rows.append(row)
        print(
            f"{S} tokens, budget {budget}, page {page_size}: dense {ms['dense']:.2f} ms; Quest {ms['quest']:.3f} "
            f"({row['quest_x']}x), with summaries in e4m3 {ms['quest_e4m3']:.3f} ({row['quest_e4m3_x']}x), "
            f"DELTA's sparse layers {ms['delta']:.3f} ({row['delta_x']}x), planner {ms['planner']:.2f} "
            f"({row['planner_x']}x)",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, default=65536)
    parser.add_argument("--step-prefix", type=int, default=32768)
    parser.add_argument("--budgets", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--units", nargs="+", type=int, default=[16, 1])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    machine = facts.machine()
    rows = lists(args.prefix, args.budgets, args.units, args.layers, args.repeats)
    rows += step(args.step_prefix, args.layers, args.repeats)
    print(f"written to {facts.record('sparse', machine, rows)}")


if __name__ == "__main__":
    main()
