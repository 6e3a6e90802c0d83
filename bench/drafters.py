"""Every drafter on real texts: SmolLM2-135M, six kinds of prompts, batches of 1, 4 and 16, against plain `generate`,
transformers' prompt lookup and early exit, and the peers economize and flashspec where `make bench-peers` put them.

Method: for every batch of prompts (bench/prompts.py) all contestants decode greedily, one after another in random
order, in one process and with one model; that is repeated --repeats times. Ratios are those within a repeat, medians of
them are taken: memory may be fast in one repeat and slow in the next. Every run begins with a new drafter, an empty
store (cold). Batches of 4 hold the four prompts of a kind; batches of 16 hold each of them four times, with different
system messages. "extra" contestants, which are slow here, run on the first batch of a kind only. Seconds include the
prompt's forward; "decode" counts from the first token on. With --task-tags, "auto" keeps what it learned of a kind from
batch to batch, as a server would.

How to read: "x plain" is the ratio of tokens per second, decode; "t/fwd" the tokens that a row gains per forward;
"draft" the share of time spent drafting; "same" whether texts equal plain generate's (in bf16 near-ties part them).
The summary gives the geometric mean over kinds of auto over the best of the lookups of transformers and economize, the
worst kind, and auto over the best fixed drafter.

Artefacts: two shared cores; single runs vary by 10 % and more.

Reference results: bench/results/drafters-*.json, and docs/drafters.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

import branchwise as bw
import facts
import prompts
from branchwise.decoding import Auto, Bandit
from branchwise.demo import load_smollm2
from branchwise.drafters import EarlyExit, Hybrid, Jacobi, Lookahead, Model, Suffix, TokenRecycling

PEERS = Path(__file__).parent.parent / "build" / "peers"
EXIT = 10  # layers of 30 that draft
EXTRA = {"jacobi", "lookahead", "early_exit", "early exit (transformers)", "early exit (economize)", "model"}
LOOKUPS = ("lookup (transformers)", "lookup (economize)", "lookup (economize, 11)")
CONTROLLERS = ("auto", "bandit")


class Clock(StoppingCriteria):
    """Notes when the first token was there; stops nothing."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids, scores, **kwargs):
        self.first = self.first or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


# (inputs, new tokens, clock) -> texts [B, n], stats or None
Run = Callable[[Any, int, Clock], tuple[torch.Tensor, Any]]


def plain(model, **options) -> Run:
    def run(inputs, n, clock):
        out = model.generate(**inputs, max_new_tokens=n, do_sample=False, stopping_criteria=[clock], **options)
        return out, None

    return run


def ours(model, make) -> Run:
    def run(inputs, n, clock):
        spec = bw.TreeSpeculation(make())
        out = model.generate(
            **inputs, max_new_tokens=n, do_sample=False, stopping_criteria=[clock], custom_generate=spec
        )
        return out, spec.stats

    return run


def economize(model, name, cycle, **options) -> Run:
    import economize
    from economize.techniques.early_exit.config import EarlyExitConfig
    from economize.techniques.lookup.config import LookupConfig

    config = LookupConfig() if name == "lookup" else EarlyExitConfig(head="shared", **options)
    decoding = economize.DecodeConfig(cycle_length=cycle)
    efficient = economize.apply(model, config)

    def run(inputs, n, clock):
        return efficient.generate(**inputs, max_new_tokens=n, do_sample=False, decoding=decoding), None

    return run


def flashspec(model) -> Run:
    from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import NgramDrafter, TargetModel

    config = FlashSpecConfig(
        device="cpu",
        drafter_strategy="bandit",
        bandit=BanditConfig(n_arms=1),
        sampling=SamplingConfig(temperature=0.0),
    )
    target = TargetModel("smollm2", torch.device("cpu"), model.dtype, model=model)
    engine = SpeculativeEngine(config, [NgramDrafter()], target)

    def run(inputs, n, clock):
        result = engine.generate(inputs["input_ids"], max_new_tokens=n)
        out = result.output_ids[:, : result.n_tokens_generated]
        return torch.cat([inputs["input_ids"], out], 1), None

    return run


def contestants(model, batch_size: int, kept: dict[str, Any] | None) -> dict[str, Run]:
    draft = None

    def draft_model():
        nonlocal draft
        if draft is None:  # the target's first layers as a model of its own
            config = type(model.config).from_dict({**model.config.to_dict(), "num_hidden_layers": 6})
            draft = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
            draft.load_state_dict(model.state_dict(), strict=False)
        return Model(draft)

    def auto():
        if kept is None:
            return Auto()
        return kept.setdefault("auto", Auto())

    runs: dict[str, Run] = {
        "plain": plain(model),
        **{name: ours(model, lambda name=name: name) for name in ("trie", "suffix", "prompt_lookup")},
        "token_recycling": ours(model, TokenRecycling),
        "hybrid": ours(model, lambda: Hybrid(Suffix(), TokenRecycling())),
        "auto": ours(model, auto),
        "bandit": ours(model, Bandit),
        "jacobi": ours(model, Jacobi),
        "lookahead": ours(model, lambda: Lookahead(window=4, ngram=4, guesses=4)),
        "early_exit": ours(model, lambda: EarlyExit(EXIT)),
        "model": ours(model, draft_model),
    }
    if importlib.util.find_spec("economize"):
        runs["lookup (economize)"] = economize(model, "lookup", 4)
        runs["lookup (economize, 11)"] = economize(model, "lookup", 11)
        runs["early exit (economize)"] = economize(model, "early_exit", 4, exit_layer=EXIT)
    if batch_size == 1:
        runs["lookup (transformers)"] = plain(model, prompt_lookup_num_tokens=10)
        runs["early exit (transformers)"] = plain(model, assistant_early_exit=EXIT)
        if importlib.util.find_spec("flashspec"):
            runs["lookup (flashspec)"] = flashspec(model)
    return runs


def batches(texts: list[str], size: int) -> list[list[str]]:
    if size <= len(texts):
        return [texts[i : i + size] for i in range(0, len(texts), size)]
    tones = ("helpful", "concise", "friendly", "careful")
    return [[text.replace("helpful", tone, 1) for tone in tones for text in texts]]


def tokens_of(out: torch.Tensor, length: int, ends: set[int]) -> list[list[int]]:
    rows = []
    for row in out[:, length:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends or token < 0), len(row))
        rows.append(row[:end])
    return rows


def measure(runs: dict[str, Run], inputs, new_tokens: int, repeats: int, ends: set[int], order) -> dict[str, Any]:
    length = inputs["input_ids"].shape[1]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            clock = Clock()
            begun = time.perf_counter()
            try:
                out, stats = runs[name](inputs, new_tokens, clock)
            except Exception as error:
                if "(" not in name:
                    raise  # our own; a peer's failure is shown and does not end the run
                print(f"    {name}: {type(error).__name__}: {str(error)[:150]}")
                continue
            end = time.perf_counter()
            samples[name].append(
                {"rows": tokens_of(out, length, ends), "first": clock.first, "begun": begun, "end": end, "stats": stats}
            )
    prompt = median(s["first"] - s["begun"] for s in samples["plain"])
    results = {}
    for name, taken in samples.items():
        if len(taken) < repeats:
            continue  # a peer that failed has no time to compare in that repeat
        last = taken[-1]
        stats = last["stats"]
        # Who does not tell when the first token came is given plain generate's time for it.
        results[name] = {
            "tokens": [sum(map(len, s["rows"])) for s in taken],  # near-ties may end a text elsewhere
            "total": [s["end"] - s["begun"] for s in taken],
            "decode": [s["end"] - (s["first"] or s["begun"] + prompt) for s in taken],
            "same": last["rows"] == samples["plain"][-1]["rows"],
            "tokens_per_forward": stats.tokens_per_forward if stats else None,
            "draft_share": stats.seconds_draft / (last["end"] - last["first"]) if stats else None,
        }
    return results


def pace(results: Sequence[dict[str, Any]], key: str, repeat: int) -> float:
    """Seconds per token of some batches in one repeat."""
    return sum(result[key][repeat] for result in results) / sum(result["tokens"][repeat] for result in results)


def table(kind: str, results: list[dict[str, Any]], facts_of_run: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name in results[0]:
        taken = [(r[name], r["plain"]) for r in results if name in r]
        mine, base = zip(*taken, strict=True)
        repeats = range(len(mine[0]["decode"]))
        # Seconds per token of both on the same batches, repeat by repeat.
        speed = {
            key: median(pace(base, key, repeat) / pace(mine, key, repeat) for repeat in repeats)
            for key in ("decode", "total")
        }
        per_forward = [m["tokens_per_forward"] for m, _ in taken if m["tokens_per_forward"]]
        shares = [m["draft_share"] for m, _ in taken if m["draft_share"] is not None]
        rows.append(
            {
                **facts_of_run,
                "kind": kind,
                "drafter": name,
                "batches": len(taken),
                "x_plain_decode": round(speed["decode"], 3),
                "x_plain_total": round(speed["total"], 3),
                "tokens_per_s": round(1 / median(pace(mine, "total", repeat) for repeat in repeats), 1),
                "tokens_per_forward": round(sum(per_forward) / len(per_forward), 2) if per_forward else None,
                "draft_share": round(sum(shares) / len(shares), 3) if shares else None,
                "same": f"{sum(m['same'] for m, _ in taken)}/{len(taken)}",
            }
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> None:
    kinds = sorted({row["kind"] for row in rows})
    speed = {(row["kind"], row["drafter"]): row["x_plain_decode"] for row in rows}
    fixed = {row["drafter"] for row in rows} - {"plain", *CONTROLLERS, *EXTRA}
    fixed = {name for name in fixed if "(" not in name}
    for controller in (name for name in CONTROLLERS if (kinds[0], name) in speed):
        best = [speed[k, controller] / max(speed[k, name] for name in fixed) for k in kinds]
        worst = min(speed[k, controller] for k in kinds)
        print(f"  {controller}: worst kind {worst:.2f}x plain; over the best fixed drafter, least {min(best):.2f}")
        lookups = [name for name in LOOKUPS if all((k, name) in speed for k in kinds)]
        if lookups:
            ratios = [speed[k, controller] / max(speed[k, name] for name in lookups) for k in kinds]
            print(f"  {controller}: over the best lookup, geometric mean {geometric_mean(ratios):.2f}, least "
                  f"{min(ratios):.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per kind")
    parser.add_argument("--kinds", nargs="*", help="of prompts; all of them by default")
    parser.add_argument("--only", nargs="*", help="names of contestants; plain is always in")
    parser.add_argument("--skip-extra", action="store_true")
    parser.add_argument("--task-tags", action="store_true")
    options = parser.parse_args()
    sys.path += [str(path) for path in PEERS.glob("lib/python3*/site-packages")]
    machine = facts.machine()
    print(machine)
    order = random.Random(0)
    for dtype in options.dtypes:
        model, tokenizer = load_smollm2(getattr(torch, dtype))
        tokenizer.padding_side = "left"
        ends = set(torch.tensor(model.generation_config.eos_token_id).flatten().tolist())
        warm_up = tokenizer(prompts.open_chat()[0], return_tensors="pt")
        for custom in (None, bw.TreeSpeculation()):
            model.generate(**warm_up, max_new_tokens=24, do_sample=False, custom_generate=custom)
        for size in options.batches:
            rows = []
            for kind, texts in prompts.by_kind().items():
                if options.kinds and kind not in options.kinds:
                    continue
                runs = contestants(model, size, {} if options.task_tags else None)
                wanted = {name: run for name, run in runs.items() if not options.only or name in options.only}
                wanted = {"plain": runs["plain"], **wanted}
                results = []
                for i, batch in enumerate(batches(texts[: options.prompts], size)):
                    slow = i > 0 or options.skip_extra
                    chosen = {name: run for name, run in wanted.items() if not (slow and name in EXTRA)}
                    inputs = tokenizer(batch, return_tensors="pt", padding=True)
                    results.append(measure(chosen, inputs, options.new_tokens, options.repeats, ends, order))
                rows += table(kind, results, {"dtype": dtype, "batch": size})
                print(f"\n{dtype} batch {size} {kind}", flush=True)
                for row in (row for row in rows if row["kind"] == kind):
                    share = "" if row["draft_share"] is None else f"{row['draft_share']:6.1%}"
                    print(
                        f"  {row['drafter']:28s}{row['x_plain_decode']:6.2f}x plain{row['tokens_per_s']:8.1f} t/s"
                        f"{row['tokens_per_forward'] or '':>7} t/fwd {share:>6} draft  same {row['same']}",
                        flush=True,
                    )
            path = facts.record(f"drafters-{dtype}-batch{size}", machine, rows)
            print(f"\n{dtype} batch {size}, written to {path}")
            summary(rows)


if __name__ == "__main__":
    main()
