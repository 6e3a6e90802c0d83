"""What the drafters that look texts up are worth, without a model: recorded answers are drafted again.

Method: SmolLM2's greedy answers to the prompts of bench/prompts.py are recorded once. Then, per drafter and prompt, the
answer is replayed: propose a tree within a budget of nodes, accept the path that the answer takes, observe, and so on.
"cold" starts with an empty drafter; "warm" has seen the answer to the same prompt. Between prompts the drafter is
made anew.

How to read: tokens per forward, the first token (the prompt's) left out; plain decoding has 1. Microseconds are the
mean of propose + observe per round, at a history that the prompt and answer make; --history puts that many random
tokens in front. "lookup (transformers)" is prompt lookup with transformers' rule: two tokens at most, leftmost match,
ten tokens.

Artefacts: with every node verified, larger budgets always accept more; what a node costs is not in here
(bench/decode.py has it).

Reference result: bench/results, and the README.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

import branchwise as bw
import facts
import prompts
from branchwise.demo import load_smollm2
from branchwise.drafters import Drafter, DraftRequest, PromptLookup, Suffix, Trie, Verified

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "lookup (transformers)": lambda: PromptLookup(max_ngram=2, num_tokens=10, match="first"),
    "prompt_lookup": PromptLookup,
    "trie": Trie,
    "suffix": Suffix,
}


def record(kinds: dict[str, list[str]], new_tokens: int) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Prompt and answer of every prompt, i32."""
    model, tokenizer = load_smollm2(torch.float32)
    tokenizer.padding_side = "left"
    recorded = {}
    for kind, texts in kinds.items():
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, custom_generate=bw.TreeSpeculation()
        ).numpy()
        length, eos = inputs.input_ids.shape[1], model.generation_config.eos_token_id
        recorded[kind] = []
        for row, mask in zip(out, inputs.attention_mask.numpy(), strict=True):
            answer = row[length:]
            ends = np.flatnonzero(np.isin(answer, eos))
            answer = answer[: ends[0] + 1] if len(ends) else answer
            recorded[kind].append((row[:length][mask == 1].astype(np.int32), answer.astype(np.int32)))
    return recorded


def replay(drafter: Drafter, prompt: np.ndarray, answer: np.ndarray, budget: int) -> tuple[int, float]:
    """Rounds until the answer is said, and seconds spent in the drafter."""
    session = drafter.begin(DraftRequest([prompt], frozenset({2})))
    session.observe(Verified([[int(answer[0])]]))
    said, rounds, spent = 1, 0, 0.0
    while said < len(answer):
        begun = time.perf_counter()
        tree = session.propose([budget])[0]
        spent += time.perf_counter() - begun
        node, accepted = 0, 0
        while said + accepted < len(answer):
            hits = np.flatnonzero((tree.parents == node) & (tree.tokens == answer[said + accepted]))
            if len(hits) == 0:
                break
            node = int(hits[0])
            accepted += 1
        emitted = answer[said : said + accepted + 1]
        begun = time.perf_counter()
        session.observe(Verified([emitted.tolist()]))
        spent += time.perf_counter() - begun
        said += len(emitted)
        rounds += 1
    session.close()
    return rounds, spent


def measure(recorded, budget: int, history: np.ndarray) -> list[dict[str, object]]:
    rows = []
    print(f"\n{budget} nodes\n{'kind':12}{'drafter':24}{'cold':>8}{'warm':>8}{'us':>8}")
    for kind, texts in recorded.items():
        for name, make in DRAFTERS.items():
            emitted, cold, warm, spent = 0, 0, 0, 0.0
            for prompt, answer in texts:
                drafter = make()
                prompt = np.concatenate([history, prompt])
                first, seconds = replay(drafter, prompt, answer, budget)
                cold, spent, emitted = cold + first, spent + seconds, emitted + len(answer) - 1
                warm += replay(drafter, prompt, answer, budget)[0]
            row = {
                "kind": kind,
                "drafter": name,
                "nodes": budget,
                "history": len(history),
                "cold": round(emitted / cold, 3),
                "warm": round(emitted / warm, 3),
                "us_per_round": round(spent / cold * 1e6, 1),
            }
            rows.append(row)
            print(f"{kind:12}{name:24}{row['cold']:8.2f}{row['warm']:8.2f}{row['us_per_round']:8.1f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--history", type=int, default=0, help="random tokens before the prompt")
    parser.add_argument("--held-out", action="store_true", help="the prompts that nothing was tuned on")
    args = parser.parse_args()
    recorded = record(prompts.held_out() if args.held_out else prompts.by_kind(), args.new_tokens)
    history = np.random.default_rng(0).integers(100, 49152, args.history).astype(np.int32)
    rows = [row for budget in args.nodes for row in measure(recorded, budget, history)]
    name = "drafter-replay" + ("-held-out" if args.held_out else "")
    name += f"-history{args.history}" if args.history else ""
    print(facts.record(name, facts.machine(), rows))


if __name__ == "__main__":
    main()
