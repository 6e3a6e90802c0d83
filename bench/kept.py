"""Pictures of what KV policies keep or attend to: SmolLM2 reads 600 tokens of prose and writes 60.

A picture per family of policies, a panel per policy: rows are layers and their KV heads, columns are positions; dark is
held after the last token (evicting policies) or attended to by it (selecting ones). Written to docs/figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import branchwise as bw
from branchwise import kv
from branchwise.attention import LayerCall
from branchwise.cache import CACHE_NAME, KVStore
from branchwise.demo import load_smollm2
from needle import learn, sentences

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
PROMPT, NEW = 600, 60


class Watch:
    """Follows evictions and selections of one call: which positions lie in the slots of every layer and head."""

    def __init__(self, layers: int, heads: int) -> None:
        self.held = [[list(range(PROMPT + NEW)) for _ in range(heads)] for _ in range(layers)]
        self.seen = torch.zeros(layers, heads, PROMPT + NEW)

    def __enter__(self) -> Watch:
        self.before = KVStore.evict, LayerCall.sparse

        def evict(store: KVStore, layer: int, keep: torch.Tensor, counts: torch.Tensor, page_size: int = 16) -> None:
            slots = int(store.layers[layer].lens.max())
            for head, held in enumerate(self.held[layer]):
                g = head if keep.shape[1] > 1 else 0
                kept = keep[0, g, : int(counts[0, g])].tolist()
                known = max(slots, max(kept) + 1)
                self.held[layer][head] = [held[slot] for slot in kept] + held[known:]
            self.before[0](store, layer, keep, counts, page_size)

        def sparse(call: LayerCall, indices: Any, counts: Any, **options: Any) -> torch.Tensor:
            self.seen[call.layer] = 0
            P, unit = int(call.lens.flatten()[0]), options.get("unit", 1)
            for head in range(self.seen.shape[1]):
                row = self.seen[call.layer, head]
                if indices is None:
                    row[: int(options["sink_sizes"][head])] = 1
                    row[max(0, P + 1 - int(options["recent_sizes"][head])) : P] = 1
                    continue
                g = head if indices.shape[2] > 1 else 0
                for i in indices[0, 0, g, : int(counts[0, 0, g])].tolist():
                    here = range(i * unit, min((i + 1) * unit, P))
                    row[[self.held[call.layer][head][slot] for slot in here]] = 1
            return self.before[1](call, indices, counts, **options)

        KVStore.evict, LayerCall.sparse = evict, sparse  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: Any) -> None:
        KVStore.evict, LayerCall.sparse = self.before  # type: ignore[method-assign]


def picture(model: Any, ids: torch.Tensor, policy: Any) -> torch.Tensor:
    """f32[layers * Hkv, positions]."""
    config = model.config
    sessions: list[Any] = []
    begin = policy.begin
    policy.begin = lambda *args: sessions.append(begin(*args)) or sessions[-1]
    with Watch(config.num_hidden_layers, config.num_key_value_heads) as watch, bw.sparse_kv(model, policy):
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    store, session, grid = out[CACHE_NAME], sessions[-1], watch.seen
    last = ids.shape[1] + NEW - 1
    for layer in range(config.num_hidden_layers):
        if grid[layer].any():
            continue
        for head in range(config.num_key_value_heads):
            held = watch.held[layer][head]
            kept = getattr(session, "kept", None)
            if kept and isinstance(kept[0], list):  # PromptDistill: the stage that the layer belongs to
                stage = sum(layer > first for first in policy.layers)
                rows = held if stage == 0 and policy.truncate == 0 else kept[max(stage - 1, 0)][0].tolist()
                held = rows + list(range(PROMPT, last)) if rows is not held else held
            elif kept:  # a shorter prompt
                held = kept[0].tolist() + list(range(PROMPT, last))
            lens = store.layers[layer].lens
            n = int(lens[0] if lens.dim() == 1 else lens[0, head])
            grid[layer, head, [p for p in held[:n] if p < last]] = 1
    return grid.flatten(0, 1)[:, :last]


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, tokenizer = load_smollm2(torch.float32)
    prose = sentences()
    learned = learn(model, tokenizer, prose)
    ids = tokenizer(" ".join(prose[200:260]), return_tensors="pt").input_ids[:, :PROMPT]
    budget = 128
    families = {
        "eviction": {
            "StreamingLLM": kv.StreamingLLM(4, budget - 4),
            "H2O": kv.H2O(budget),
            "TOVA": kv.TOVA(budget),
            "SnapKV": kv.SnapKV(budget),
            "PyramidKV": kv.PyramidKV(budget),
            "AdaKV": kv.AdaKV(budget),
        },
        "prompts": {
            "GemFilter": kv.GemFilter(budget, 14),
            "PromptDistill": kv.PromptDistill([budget], [14]),
            "SpecKV": kv.SpecKV(model, budget, 16, 32),
            "SpecPC": kv.SpecPC(model, budget, 32, kernel=16),
        },
        "heads": {"HeadwiseKV": kv.HeadwiseKV(learned["gates"], 0.5, 16, 64)},
        "selection": {
            "Quest": kv.Quest(budget, min_length=0),
            "DELTA": kv.DELTA(budget, learned["planners"], recent=32, min_length=0),
            "SpeContext": kv.SpeContext(budget=budget, min_length=0),
            "SentenceKV": kv.SentenceKV(learned["marks"], budget, sinks=4),
        },
    }
    FIGURES.mkdir(exist_ok=True)
    for family, policies in families.items():
        figure, axes = plt.subplots(len(policies), 1, figsize=(9, 0.4 + 1.5 * len(policies)), squeeze=False)
        for axis, (name, policy) in zip(axes[:, 0], policies.items(), strict=True):
            axis.imshow(picture(model, ids, policy).numpy(), cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
            axis.axvline(PROMPT - 0.5, color="grey", linewidth=0.5)
            axis.set_ylabel(name, fontsize=8)
            axis.set_yticks([0, 45, 89], ["layer 0", "15", "29"], fontsize=6)
            axis.tick_params(labelsize=6)
        axes[-1, 0].set_xlabel("position (the grey line ends the prompt)", fontsize=7)
        figure.tight_layout()
        figure.savefig(FIGURES / f"kv-{family}.png", dpi=110)
        print(f"written to {FIGURES / f'kv-{family}.png'}", flush=True)


if __name__ == "__main__":
    main()
