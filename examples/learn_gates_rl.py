"""Learns gates for `branchwise.kv.HeadwiseKV` as RLKV does: from rewards of answers that the gated model samples.

The model is frozen and its attention gated as in learn_gates.py. Every question is answered several times with the
gates in place; an answer is right or wrong. Answers that are better than their siblings are made likelier (GRPO without
a KL term), with gradients in the gates alone, and a penalty pulls the gates to 0, more so the more answers are right
and not at all while most are wrong. So it measures what a head does for the whole answer, not for the next hidden
state. Card rlkv, algorithm B; Du et al. 2025, arXiv 2510.08525. Questions should be ones that the full model answers.

    python examples/learn_gates_rl.py --steps 60 --out gates.pt          # SmolLM2-135M
    policy = kv.HeadwiseKV(torch.load("gates.pt"), sparsity=0.5)
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from learn_gates import Gates, gated
from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Question:
    ids: Tensor  # i64[1, n]
    right: Callable[[Tensor], bool]  # of the new tokens i64[m]


def learn_gates(
    model: PreTrainedModel,
    questions: Callable[[int], Question],
    steps: int,
    sinks: int = 16,
    recent: int = 64,
    samples: int = 4,
    new_tokens: int = 16,
    rate: float = 0.01,
    weight_decay: float = 0.017,
    penalty: float = 1e-3,
    enough: float = 0.5,
    report: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """f32[layers, Hkv] gates after ``steps`` questions, each answered ``samples`` times at temperature 1.

    ``enough``: share of right answers above which closing gates is rewarded; ``penalty``: how much.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gates = Gates(model, sinks, recent)
    optimizer = torch.optim.AdamW([gates.values], lr=rate, weight_decay=weight_decay)
    with gated(model, gates):
        for step in range(steps):
            question = questions(step)
            n = question.ids.shape[1]
            with torch.no_grad():
                answers = model.generate(
                    question.ids.expand(samples, -1),
                    attention_mask=torch.ones(samples, n, dtype=torch.long),
                    max_new_tokens=new_tokens,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=0,
                )
            rewards = torch.tensor([float(question.right(answer[n:])) for answer in answers])
            mean = float(rewards.mean())
            loss = gates.values.abs().mean() * (penalty * (math.exp(mean) - 1) if mean > enough else 0.0)
            if 0 < mean < 1:  # otherwise no answer is better than its siblings
                advantages = (rewards - mean) / rewards.std()
                logits = model(answers, use_cache=False).logits[:, n - 1 : -1].float()
                said = logits.log_softmax(-1).gather(2, answers[:, n:, None])[..., 0]
                loss = loss - (advantages[:, None] * said).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                gates.values.clamp_(0, 1)
            if report is not None:
                report(step, mean, gates.values.detach())
    return gates.values.detach().clone()


def main() -> None:
    from pydoc_data.topics import topics

    from branchwise.demo import load_smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--out", default="gates.pt")
    args = parser.parse_args()
    model, tokenizer = load_smollm2(torch.float32)
    prose = tokenizer(" ".join(topics.values())[:200_000]).input_ids

    def question(step: int) -> Question:
        """Where a passkey hides in prose: what is it? One that the full model finds greedily."""
        for attempt in range(100):
            found = passkey(random.Random(f"{step} {attempt}"))
            if found.right(model.generate(found.ids, max_new_tokens=8, do_sample=False)[0, found.ids.shape[1] :]):
                return found
        raise RuntimeError("the model finds no passkey")

    def passkey(r: random.Random) -> Question:
        code = str(r.randint(10000, 99999))
        begin, cut = r.randrange(len(prose) - args.length), r.randrange(args.length // 2)
        body = prose[begin : begin + args.length]
        told = tokenizer(f" The passkey is {code}. Remember it: {code}.").input_ids
        asked = tokenizer(" What is the passkey? The passkey is").input_ids
        ids = torch.tensor([body[:cut] + told + body[cut:] + asked])
        return Question(ids, lambda answer: code in tokenizer.decode(answer).split(".")[0])

    def report(step: int, reward: float, gates: Tensor) -> None:
        if step % 5 == 0:
            print(f"step {step}: {reward:.2f} right, mean gate {gates.mean():.3f}", flush=True)

    solved = [question(step) for step in range(args.steps)]
    gates = learn_gates(model, solved.__getitem__, args.steps, new_tokens=8, penalty=0.1, report=report)
    torch.save(gates, args.out)
    print(f"written to {args.out}; {int((gates > 0.5).sum())} of {gates.numel()} gates above 0.5")


if __name__ == "__main__":
    main()
