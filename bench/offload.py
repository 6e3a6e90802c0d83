"""Layers in memory against layers in files: time per token, bytes in memory and bytes fetched, SmolLM2 in bf16.

Method: one prompt of a few thousand tokens of prose, then greedy tokens, once per policy and place. The time is that of
the decoding rounds alone. Files lie in --directory, and their pages in the system's cache as far as it likes: a machine
whose memory is really full reads them from the disk.

How to read: "in memory" is what the store and the policy hold after the last token: slots, pages that were fetched,
summaries, the retrieval head's keys. "fetched" is what a token has copied from the files to memory.

Reference results: bench/results/offload-*.json, and docs/kv-selection.md.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch

import branchwise as bw
import facts
from branchwise import kv
from branchwise.demo import load_smollm2
from needle import sentences


class Kept:
    """A policy that remembers its session."""

    def __init__(self, policy: kv.KVPolicy) -> None:
        self.policy = policy

    def begin(self, model: Any, store: Any) -> kv.KVSession:
        self.session = self.policy.begin(model, store)
        return self.session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=6000)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    args = parser.parse_args()

    model, tokenizer = load_smollm2(torch.bfloat16)
    ids = tokenizer(" ".join(sentences()), return_tensors="pt").input_ids[:, : args.prompt]
    marks = kv.sentence_marks(tokenizer)
    policies = {
        "Quest": lambda **place: kv.Quest(args.budget, min_length=0, **place),
        "SpeContext": lambda **place: kv.SpeContext(budget=args.budget, min_length=0, **place),
        "SentenceKV": lambda **place: kv.SentenceKV(marks, args.budget, **place),
    }
    rows = []
    for name, make in policies.items():
        texts = []
        for place in ({}, {"offload": args.directory}):
            policy = Kept(make(**place))
            with bw.sparse_kv(model, policy):
                out = model.generate(
                    ids, max_new_tokens=args.new, do_sample=False, eos_token_id=None, return_dict_in_generate=True
                )
            session = policy.session
            seconds = out.stats.seconds_forward + out.stats.seconds_verify
            offloaded = getattr(session, "offloaded", None)
            texts.append(out.sequences)
            rows.append(
                {
                    "policy": name,
                    "layers": "in files" if place else "in memory",
                    "ms per token": round(seconds / (args.new - 1) * 1e3, 1),
                    "MB in memory": round((session.store.num_bytes + session.num_bytes) / 1e6, 1),
                    "MB fetched per token": round(offloaded.copied_bytes / args.new / 1e6, 2) if offloaded else 0.0,
                }
            )
            print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
        assert torch.equal(*texts), f"{name}: the texts differ"
    options = {"prompt": args.prompt, "new": args.new, "budget": args.budget}
    print(facts.record("offload", facts.machine() | options, rows))


if __name__ == "__main__":
    main()
