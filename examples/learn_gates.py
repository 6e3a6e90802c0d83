"""Learns gates for `branchwise.kv.HeadwiseKV` as DuoAttention does: which KV heads need the whole context?

The model is frozen. In every layer a head's output is gate * full attention + (1 - gate) * attention to sinks and
recent tokens; the gates, one per KV head, are trained so that the last hidden states stay close to the full model's
where it matters, while a penalty pulls them to 0. Text: prose with passkeys hidden in it, repeated at the end; only
those positions count. Card rlkv, algorithm B; Xiao et al. 2024, arXiv 2410.10819. (RLKV learns the same gates from
rewards of sampled answers, and is not shown.)

    python examples/learn_gates.py --steps 100 --out gates.pt          # SmolLM2-135M
    policy = kv.HeadwiseKV(torch.load("gates.pt"), sparsity=0.5)
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

Batch = tuple[Tensor, Tensor]  # i64[1, n] token ids, bool[n] positions that count


class Gates(torch.nn.Module):
    """f32[layers, Hkv] in [0, 1], and the windows they choose between."""

    def __init__(self, model: PreTrainedModel, sinks: int, recent: int) -> None:
        super().__init__()
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        self.values = torch.nn.Parameter(torch.ones(config.num_hidden_layers, heads))
        self.sinks, self.recent = sinks, recent
        self.active = True

    def attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        group, n, past = query.shape[1] // key.shape[1], key.shape[2], key.shape[2] - query.shape[2]
        keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
        logits = query @ keys.mT * options["scaling"]
        distance = torch.arange(past, n)[:, None] - torch.arange(n)
        full = distance >= 0
        out = self._attend(logits, full, values)
        if self.active:
            near = full & ((distance < self.recent) | (torch.arange(n) < self.sinks))
            gate = self.values[module.layer_idx].repeat_interleave(group)[None, :, None, None].to(out.dtype)
            out = gate * out + (1 - gate) * self._attend(logits, near, values)
        return out.transpose(1, 2), None

    @staticmethod
    def _attend(logits: Tensor, visible: Tensor, values: Tensor) -> Tensor:
        return logits.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32).to(values.dtype) @ values


@contextmanager
def gated(model: PreTrainedModel, gates: Gates) -> Iterator[None]:
    """Inside, the model's attention is the gates'."""
    AttentionInterface.register("gates", gates.attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("gates")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def learn_gates(
    model: PreTrainedModel,
    batches: Callable[[int], Batch],
    steps: int,
    sinks: int = 16,
    recent: int = 64,
    rate: float = 0.02,
    penalty: float = 0.05,
    report: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """f32[layers, Hkv] gates after ``steps`` of AdamW; ``batches(step)`` gives a text and the positions that count."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gates = Gates(model, sinks, recent)
    optimizer = torch.optim.AdamW([gates.values], lr=rate, weight_decay=0.0)
    with gated(model, gates):
        for step in range(steps):
            ids, counts = batches(step)
            gates.active = False
            with torch.no_grad():
                full = model.base_model(ids, use_cache=False).last_hidden_state[0, counts]
            gates.active = True
            mixed = model.base_model(ids, use_cache=False).last_hidden_state[0, counts]
            distance = (full - mixed).float().square().mean()
            loss = distance + penalty * gates.values.abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                gates.values.clamp_(0, 1)
            if report is not None:
                report(step, float(distance.detach()), gates.values.detach())
    return gates.values.detach().clone()


def passkeys(tokenizer: Any, prose: str, length: int, keys: int = 4) -> Callable[[int], Batch]:
    """Texts of about ``length`` tokens with passkeys in the prose, and all of them again at the end, which counts."""
    tokens = tokenizer(prose).input_ids

    def batch(step: int) -> Batch:
        r = random.Random(step)
        codes = [" ".join(str(r.randint(100, 999)) for _ in range(8)) for _ in range(keys)]
        begin = r.randrange(max(1, len(tokens) - length))
        body, cuts = tokens[begin : begin + length], sorted(r.randrange(length) for _ in codes)
        text: list[int] = []
        for i, (cut, code) in enumerate(zip(cuts, codes, strict=True)):
            text += body[cuts[i - 1] if i else 0 : cut] + tokenizer(f" Passkey {i} is {code}.").input_ids
        text += body[cuts[-1] :]
        end = [t for i, code in enumerate(codes) for t in tokenizer(f" Passkey {i} is {code}.").input_ids]
        counts = torch.zeros(len(text) + len(end), dtype=torch.bool)
        counts[len(text) :] = True
        return torch.tensor([text + end]), counts

    return batch


def main() -> None:
    from pydoc_data.topics import topics

    from branchwise.demo import load_smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--out", default="gates.pt")
    args = parser.parse_args()
    model, tokenizer = load_smollm2(torch.float32)

    def report(step: int, distance: float, gates: Tensor) -> None:
        if step % 10 == 0:
            print(f"step {step}: distance {distance:.4f}, mean gate {gates.mean():.3f}", flush=True)

    prose = " ".join(topics.values())[:200_000]
    gates = learn_gates(model, passkeys(tokenizer, prose, args.length), args.steps, report=report)
    torch.save(gates, args.out)
    print(f"written to {args.out}; {int((gates > 0.5).sum())} of {gates.numel()} gates above 0.5")


if __name__ == "__main__":
    main()
