"""Decoders of masked-diffusion models: forwards, tokens per forward, tokens per second, batch 1.

Method: the small model that is trained on the standard library continues passages of branchwise's own sources, which it
has not seen, under its block-causal and its full pattern. All decoders of a pattern run in turn, prompt by prompt, a
few times; times are medians over the rounds, of whole generate calls; forwards are those of the last. A round begins
with new decoders, so that what they learn is of the prompts before, never of the same one; only costs of forwards,
which belong to the model, stay. "same text" compares with the static decoding that the decoder must equal (the one with
its cache and rule); for dynamic decoders it is the static text, which they may leave, and for "tree mask" and "copies"
in 16 bits, too, as they sum in another order.

How to read: "x static" is static decoding's time over the decoder's, of the same rule and cache.

Artefacts: the model is tiny, so a forward of a few tokens is mostly Python's time, and every further token costs
arithmetic, in fp32 four times that of bf16 (docs/diffusion.md has the milliseconds). Where a forward waits for weights
to be read, ratios differ.

Reference results: bench/results/diffusion-*.json, and docs/diffusion.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import branchwise
import facts
from branchwise.demo_diffusion import load_diffusion
from branchwise.diffusion import (
    AncestralSampling,
    BlockDecoder,
    EntropyBudget,
    FreeDave,
    RewardGuidedSampling,
    Static,
    Threshold,
    TimeSchedule,
)


def prompts(tokenizer: Any, count: int, length: int) -> list[torch.Tensor]:
    files = sorted(Path(branchwise.__file__).parent.glob("*.py"))[:count]
    return [tokenizer(file.read_text(), return_tensors="pt").input_ids[:, 100 : 100 + length] for file in files]


def decoders(attention: str) -> dict[str, tuple[Any, str]]:
    """Name -> decoder, which knows nothing yet, and the name of the static one that it is compared with."""
    found: dict[str, tuple[Any, str]] = {}
    for cache in ("block",) if attention == "block_causal" else ("none", "prefix", "dual"):
        for name, rule in {"one per step": Static(), "threshold 0.9": Threshold(0.9)}.items():
            static = f"{cache}: {name}"
            found[static] = (BlockDecoder(rule, cache=cache), static)
            found[f"{cache}: {name}, FreeDave"] = (FreeDave(rule, cache=cache), static)
            for d in (4, 8):
                found[f"{cache}: {name}, FreeDave {d}"] = (FreeDave(rule, d, cache=cache, least_chance=0.05), static)
            if name == "one per step":
                found[f"{cache}: {name}, FreeDave 16"] = (FreeDave(rule, 16, cache=cache, least_chance=0.0), static)
                chain = {"drafts": "chain", "cache": cache, "least_chance": 0.0}
                found[f"{cache}: {name}, FreeDave 4, chain"] = (FreeDave(rule, 4, **chain), static)
                found[f"{cache}: {name}, FreeDave 8, chain"] = (FreeDave(rule, 8, **chain), static)
                found[f"{cache}: {name}, FreeDave 8, chain, not eager"] = (FreeDave(rule, 8, False, **chain), static)
                for form, said in {"copy": "copies", "tree": "tree mask"}.items():
                    dave = FreeDave(rule, 8, cache=cache, form=form, least_chance=0.05)
                    found[f"{cache}: {name}, FreeDave 8, {said}"] = (dave, static)
                found[f"{cache}: {name}, tree mask"] = (BlockDecoder(rule, cache=cache, form="tree"), static)
        reference = f"{cache}: one per step"
        found[f"{cache}: entropy 0.35"] = (BlockDecoder(EntropyBudget(0.35), cache=cache), reference)
        found[f"{cache}: half the steps"] = (
            BlockDecoder(Static(4 if cache == "block" else 16), cache=cache),
            reference,
        )
        found[f"{cache}: time schedule"] = (
            BlockDecoder(TimeSchedule(4 if cache == "block" else 16), cache=cache),
            reference,
        )
    if attention == "full":
        found["ancestral 32"] = (AncestralSampling(32, seed=0), "none: one per step")
        # Any reward shows what one costs; this asks for tokens that are sure.
        guided = RewardGuidedSampling(lambda tokens: tokens.amax(-1), 32, seed=0)
        found["reward-guided 32"] = (guided, "none: one per step")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: the one that comes with the sources")
    parser.add_argument("--attention", nargs="+", default=["block_causal", "full"])
    parser.add_argument("--dtype", default="float32", help="or bfloat16, as the weights are stored")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for attention in args.attention:
        model, tokenizer = load_diffusion(args.model, attention)
        model = model.to(getattr(torch, args.dtype))
        texts = prompts(tokenizer, args.prompts, args.length)
        table = decoders(attention)
        seconds: dict[str, list[float]] = {name: [] for name in table}
        said: dict[str, list[torch.Tensor]] = {name: [] for name in table}
        for repeat in range(args.repeats + 1):
            table, forwards = decoders(attention), dict.fromkeys(table, 0)
            for name, (decoder, _) in table.items():
                spent = 0.0
                for ids in texts:
                    begun = time.perf_counter()
                    out = model.generate(ids, max_new_tokens=args.new, eos_token_id=None, custom_generate=decoder)
                    spent += time.perf_counter() - begun
                    if repeat == 0:
                        said[name].append(out)
                    forwards[name] += decoder.stats.forwards
                if repeat:  # the first round warms up
                    seconds[name].append(spent)
        tokens = args.new * len(texts)
        for name, (_, reference) in table.items():
            ratios = [a / b for a, b in zip(seconds[reference], seconds[name], strict=True)]
            same = sum(torch.equal(a, b) for a, b in zip(said[name], said[reference], strict=True))
            rows.append(
                {
                    "attention": attention,
                    "decoder": name,
                    "forwards": forwards[name],
                    "tokens per forward": round(tokens / forwards[name], 2),
                    "tokens/s": round(tokens / median(seconds[name]), 1),
                    "x static": round(median(ratios), 2),
                    "same text": f"{same} of {len(texts)}",
                }
            )
            print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    options = {key: value for key, value in vars(args).items() if key != "model"}
    name = "-".join(["diffusion", *args.attention, *([args.dtype] if args.dtype != "float32" else [])])
    print(facts.record(name, facts.machine() | options, rows))


if __name__ == "__main__":
    main()
