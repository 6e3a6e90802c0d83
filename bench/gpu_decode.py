"""Decoding a whole model on a GPU: rounds of tree speculation in CUDA graphs against plain decoding in a CUDA graph.

    python bench/gpu_decode.py --out results --layers 8

Part of bench/gpu.py. The model is Llama-3-8B's shape with random weights in bf16, so what it accepts means nothing:
acceptance is scripted. A trie drafts as it would, and pays for it; every tree then gets a branch whose first two tokens
are kept, so that a round emits three. Verification runs, and its verdict is replaced.

Plain decoding: the fastest of (1) transformers' StaticCache and SDPA, one forward and argmax in a graph, replayed;
(2) our own round with one node, replayed without the host. The time of (1) attends to a cache as long as (2)'s.

How to read: ms per token and row, prompt excluded; "x plain" the faster plain time over ours.

Reference result: none yet; nothing of this has run on hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from branchwise import TreeSpeculation, ops
from branchwise.acceptance import Rule
from branchwise.cache import CACHE_NAME
from branchwise.drafters import Needs, Trie
from branchwise.tree import DrawKind, RowTree

ROOT = Path(__file__).parent.parent
KEPT = 3  # tokens per round
STEPS = 24  # of plain decoding, per run
CASES = ((1, 4096, 16), (1, 4096, 32), (8, 4096, 16))  # rows, prompt, nodes


class ScriptedTrees:
    """What a trie drafts is paid for and replaced by trees of a fixed shape, a branch first."""

    draws, needs = DrawKind.DETERMINISTIC, Needs.NOTHING

    def __init__(self, nodes: int) -> None:
        self.trie = Trie()
        parents = [-1, *range(KEPT - 1), *(max(0, (i - 1) // 3) for i in range(KEPT, nodes))]
        self.parents = np.array(parents[:nodes], np.int32)
        self.scores = np.concatenate([[1.0], np.full(nodes - 1, 0.5)]).astype(np.float32)

    def begin(self, request: Any) -> ScriptedTrees:
        self.session = self.trie.begin(request)
        self.observe, self.keep, self.close = self.session.observe, self.session.keep, self.session.close
        return self

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        tokens = np.arange(len(self.parents), dtype=np.int32)
        trees = []
        for tree, budget in zip(self.session.propose(budgets), budgets, strict=True):
            tokens[0] = tree.tokens[0]
            trees.append(RowTree(tokens.copy(), self.parents, self.scores).first(budget))
        return trees


def _scripted(tree: Any, u: Any, scores: torch.Tensor, temperature: float, ready: Any) -> Any:
    nodes, count, bonus = ops.verify_greedy(*tree.walk, scores, ready=ready)
    path = torch.arange(nodes.shape[1], dtype=torch.int32, device=nodes.device)
    kept = min(KEPT, nodes.shape[1])
    return torch.where(path < kept, path, -1).expand_as(nodes).contiguous(), torch.full_like(count, kept), bonus


SCRIPTED = Rule("scripted", False, frozenset({DrawKind.DETERMINISTIC}), _scripted)


def llama(layers: int, device: str) -> PreTrainedModel:
    """Llama-3-8B's shape, random."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=16384,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begin


class Speculated:
    """``generate`` with scripted acceptance; ``run`` returns seconds per token and row, prompt excluded."""

    def __init__(self, model: PreTrainedModel, prompts: torch.Tensor, nodes: int, new: int) -> None:
        self.model, self.prompts, self.new = model, prompts, new
        drafter: Any = ScriptedTrees(nodes) if nodes > 1 else "none"
        self.spec = TreeSpeculation(drafter, max_nodes=nodes, adaptive=False, rule=SCRIPTED if nodes > 1 else None)

    def run(self) -> float:
        begin = time.perf_counter()
        options = {"max_new_tokens": self.new, "do_sample": False, "pad_token_id": 0}
        self.model.generate(self.prompts, custom_generate=self.spec, **options)
        stats = self.spec.stats
        return (time.perf_counter() - begin - stats.seconds_prefill) * len(self.prompts) / (stats.emitted - 1)

    @property
    def rounds(self) -> Any:
        return self.spec._rounds[self.model]


def replayed(rounds: Any, device: torch.device) -> float:
    """Seconds per token of one-node rounds that go on by themselves."""
    [round_] = [r for key, r in rounds._rounds.items() if key.nodes == 1 and r.recording is not None]
    return timed(lambda: [round_.recording.replay() for _ in range(STEPS)], device) / STEPS


def static_cache(model: PreTrainedModel, rows: int, prompt: int, slots: int) -> Callable[[], Any]:
    """A replay of one plain forward and argmax over transformers' static cache, at the end of a prompt."""
    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=slots)
    tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    position = torch.full((rows, 1), prompt, device=device)
    seen = torch.arange(slots, device=device)[None, None, None, :] <= prompt

    def step() -> None:
        # A mask of our own: building one would read positions.
        logits = model(
            input_ids=tokens,
            position_ids=position,
            attention_mask=seen.expand(rows, 1, 1, slots),
            **{CACHE_NAME: cache},
            use_cache=True,
        ).logits
        tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def decode_row(model: PreTrainedModel, case: tuple[int, int, int], new: int, repeats: int) -> dict[str, Any]:
    rows, prompt, nodes = case
    device = model.device
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 1000, (rows, prompt), generator=generator).to(device)
    ours, alone = Speculated(model, prompts, nodes, new), Speculated(model, prompts, 1, 64)
    begun = time.perf_counter()
    first = ours.run(), alone.run()  # which records the graphs
    row: dict[str, Any] = {"rows": rows, "prompt": prompt, "nodes": nodes, "seconds_first": time.perf_counter() - begun}
    row |= {"graphs": ours.rounds.recorded, "unfit": ours.rounds.unfit, "first": first}
    times: dict[str, list[float]] = {"ours": [], "one node, replayed": []}
    plain = None
    if device.type == "cuda":
        try:
            plain = static_cache(model, rows, prompt, ours.rounds.store.capacity)
            times["static cache"] = []
        except Exception as error:
            row["static cache"] = str(error).splitlines()[0][:160]
    for _ in range(repeats):
        times["ours"].append(ours.run())
        alone.run()  # back to the prompt's length
        times["one node, replayed"].append(replayed(alone.rounds, device))
        if plain is not None:
            times["static cache"].append(timed(lambda: [plain() for _ in range(STEPS)], device) / STEPS)
    row["ms"] = {name: round(median(values) * 1e3, 4) for name, values in times.items()}
    stats = ours.spec.stats
    row["tokens_per_round"] = stats.emitted / max(stats.row_forwards, 1)
    row["seconds"] = {part: getattr(stats, f"seconds_{part}") for part in ("draft", "forward", "verify")}
    row["x"] = round(min(ms for name, ms in row["ms"].items() if name != "ours") / row["ms"]["ours"], 2)
    print(f"decode B{rows} P{prompt} N{nodes}: {row['ms']}  x plain {row['x']:.2f}", flush=True)
    return row


def decode_rows(layers: int = 32, new: int = 192, repeats: int = 3, device: str = "cuda") -> list[dict[str, Any]]:
    model = llama(layers, device)
    found = []
    for case in CASES:
        try:
            found.append(decode_row(model, case, new, repeats))
        except Exception as error:
            found.append({"case": case, "error": str(error)[:300]})
            print(f"decode {case}: {error}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new", type=int, default=192, help="tokens per row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of the JSON record")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu_decode.py needs a CUDA device")
    record = {"date": date.today().isoformat(), "device": torch.cuda.get_device_name(), "layers": args.layers}
    record["decode"] = decode_rows(args.layers, args.new, args.repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-decode-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
