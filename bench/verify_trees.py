"""Part 2 of bench/verify.py: accepted tokens of every rule on trees that a quantised SmolLM2 drafts for SmolLM2."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import branchwise as bw
import prompts
from branchwise import DrawKind, KVStore, RowTree, TokenTree, acceptance
from branchwise.attention import use_attention
from branchwise.demo import load_smollm2
from branchwise.forward import StoredModel
from branchwise.target import Target

DRAWS = 400  # of noise per tree
#: name, children per level, how they are chosen, rules
SHAPES = [
    ("chain 14", [1] * 14, DrawKind.WITH_REPLACEMENT, ["chain", "block"]),
    ("binary 2+4+8", [2] * 3, DrawKind.WITH_REPLACEMENT, ["multi_draft", "traversal"]),
    ("binary 2+4+8", [2] * 3, DrawKind.WITHOUT_REPLACEMENT, ["multi_draft", "traversal", "sample_and_match"]),
    ("binary 2+4+8", [2] * 3, DrawKind.DETERMINISTIC, ["each_child", "sample_and_match"]),
    ("wide 5+5+4", [5, 1, 1], DrawKind.WITHOUT_REPLACEMENT, ["multi_draft", "traversal"]),
    ("wide 5+5+4", [5, 1, 1], DrawKind.DETERMINISTIC, ["each_child"]),
]
NODES = 14


def rounded_to_4_bits(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with every linear weight rounded to 15 levels per group of 32 inputs, the output layer excepted."""
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for layer in draft.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                groups = layer.weight.view(layer.out_features, -1, 32)
                step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
                layer.weight.copy_((torch.round(groups / step).clamp(-7, 7) * step).view_as(layer.weight))
    return draft


class Runner:
    """A model over one context: logits of trees behind it."""

    def __init__(self, model: PreTrainedModel, context: Tensor) -> None:
        self.target = StoredModel(model, KVStore(1, len(context) + NODES + 2))
        self.target.extend([context[:-1]])

    def logits(self, row: RowTree) -> Tensor:
        """[T, V]; nothing is kept."""
        tree = TokenTree([row], self.target.store.seq_lens)
        return self.target.forward(tree.tokens, tree.positions, tree.tree_mask)[0].float()


def draft_tree(runner: Runner, root: int, widths: list[int], draws: DrawKind, temperature: float, g) -> RowTree:
    """Level after level, at most NODES nodes."""
    tokens, parents, level = [root], [-1], [0]
    laws = torch.empty(0)
    for width in widths:
        row = RowTree(np.int32(tokens), np.int32(parents), np.ones(len(tokens), np.float32))
        laws = (runner.logits(row) / temperature).softmax(-1)
        below = []
        for node in level:
            if draws is DrawKind.DETERMINISTIC:
                drawn = laws[node].topk(width).indices
            else:
                replacement = draws is DrawKind.WITH_REPLACEMENT
                drawn = torch.multinomial(laws[node], width, replacement=replacement, generator=g)
            for token in drawn.tolist():
                if len(tokens) <= NODES:
                    below.append(len(tokens))
                    tokens.append(token)
                    parents.append(node)
        level = below
    index = np.where(np.isin(np.arange(len(tokens)), parents), np.arange(len(tokens)), -1)
    return RowTree(np.int32(tokens), np.int32(parents), np.ones(len(tokens), np.float32), laws, np.int32(index))


def mean_accepted(rule: acceptance.Rule, row: RowTree, draws: DrawKind, logits: Tensor, temperature: float, g) -> float:
    lens = torch.zeros(DRAWS, dtype=torch.int32)
    tree = TokenTree([row] * DRAWS, lens, draws)
    target = Target(logits.expand(DRAWS, *logits.shape), [torch.zeros(1, 1)] * DRAWS, [0] * DRAWS, [[]] * DRAWS)
    target.temperature = temperature
    count = rule(tree, target, torch.rand(*tree.shape, 2, generator=g)).count
    return float(count.float().mean()) - 1


def contexts(model, tokenizer, count: int) -> list[Tensor]:
    """Cuts of texts that the model sampled after one prompt of each kind."""
    cuts = []
    texts = [texts[0] for texts in prompts.by_kind().values() if texts]
    for i, text in enumerate(texts):
        inputs = tokenizer(text, return_tensors="pt")
        sampler = bw.TreeSpeculation(seed=i)
        out = model.generate(**inputs, do_sample=True, temperature=0.8, max_new_tokens=80, custom_generate=sampler)[0]
        start, end = inputs.input_ids.shape[1], len(out)
        per_text = -(-count // len(texts))
        cuts += [out[: start + 1 + (end - start - 2) * j // per_text] for j in range(per_text)]
    return cuts[:count]


@torch.no_grad()
def measure(count: int) -> list[dict[str, object]]:
    model, tokenizer = load_smollm2(torch.float32)
    draft, g = rounded_to_4_bits(model), torch.Generator().manual_seed(0)
    texts = contexts(model, tokenizer, count)
    results: dict[tuple[str, DrawKind, str, float], list[float]] = {}
    with use_attention(model), use_attention(draft):
        for context in texts:
            target_runner, draft_runner = Runner(model, context), Runner(draft, context)
            for temperature in (0.6, 1.0):
                for shape, widths, draws, rules in SHAPES:
                    row = draft_tree(draft_runner, int(context[-1]), widths, draws, temperature, g)
                    logits = target_runner.logits(row)
                    for name in rules:
                        rule = acceptance.RULES[name]
                        mean = mean_accepted(rule, row, draws, logits, temperature, g)
                        results.setdefault((shape, draws, name, temperature), []).append(mean)
    print(f"\n{len(texts)} contexts, {NODES} nodes\n{'shape':16}{'drawn':22}{'rule':18}{'T=0.6':>8}{'T=1.0':>8}")
    rows: list[dict[str, object]] = []
    for shape, _, draws, rules in SHAPES:
        for name in rules:
            cool, warm = (float(np.mean(results[shape, draws, name, t])) for t in (0.6, 1.0))
            print(f"{shape:16}{draws.value:22}{name:18}{cool:8.2f}{warm:8.2f}")
            rows.append(
                {
                    "shape": shape,
                    "draws": draws.value,
                    "rule": name,
                    "contexts": len(texts),
                    "accepted_t06": round(cool, 3),
                    "accepted_t10": round(warm, 3),
                }
            )
    return rows
