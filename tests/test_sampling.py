"""TreeSpeculation under do_sample=True: the plain sampler's tokens, the target's distribution, one text per seed."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
import transformers as tf
from transformers.generation import logits_process

import branchwise as bw
import tiny
from branchwise import DrawKind, acceptance
from branchwise.drafters import Model
from branchwise.noise import Noise, row_seeds
from chi_square import chi_square
from model_drafter import ModelDrafter
from random_drafter import RandomTrees

N = 20
WITH, WITHOUT = DrawKind.WITH_REPLACEMENT, DrawKind.WITHOUT_REPLACEMENT


def run(model, ids, mask, custom, **options):
    options = {"max_new_tokens": N, "do_sample": True, "top_k": 0, **options}
    return model.generate(ids, attention_mask=mask, custom_generate=custom, **options)


class NoTokenTwice(logits_process.LogitsProcessor):
    """A user's own processor: no token directly again."""

    def __call__(self, ids, scores):
        return scores.scatter(1, ids[:, -1:], -torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 0.7, "top_k": 20, "min_new_tokens": 4},
        {"top_p": 0.8, "repetition_penalty": 1.2},
        {"min_p": 0.05, "no_repeat_ngram_size": 2},
        {"typical_p": 0.9, "logits_processor": [NoTokenTwice()]},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_gives_the_plain_samplers_tokens(seed, options):
    """In ragged batches, for any tree, under any processor: token for token."""
    model = tiny.model(("llama", "gemma3", "qwen3")[seed])
    ids, mask = tiny.prompts(1 + seed, seed)
    plain = run(model, ids, mask, bw.PositionKeyedSampler(seed), **options)
    truth = [row[ids.shape[1] :].tolist() for row in plain]
    for drafter in (RandomTrees(truth, seed), "trie", "suffix", "prompt_lookup"):
        spec = bw.TreeSpeculation(drafter, max_nodes=12, adaptive=False, seed=seed)
        assert torch.equal(plain, run(model, ids, mask, spec, **options))
        assert spec.stats.rule == "sample_and_match" and spec.stats.exact
        assert spec.stats.accepted > 0 or isinstance(drafter, str)


def sampled(draws, rule=None, seed=None, **options):
    drafter = ModelDrafter(tiny.model("mistral"), draws, **options)
    return bw.TreeSpeculation(drafter, rule=rule, seed=seed)


@pytest.mark.parametrize("make", [lambda s: bw.PositionKeyedSampler(s), lambda s: bw.TreeSpeculation(seed=s)])
def test_one_seed_one_text(make):
    model = tiny.model("llama")
    ids, mask = tiny.prompts(3, 5)
    a, b, other = (run(model, ids, mask, make(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other)
    torch.manual_seed(7)
    c = run(model, ids, mask, make(None))
    torch.manual_seed(7)
    assert torch.equal(c, run(model, ids, mask, make(None)))
    assert not torch.equal(c, run(model, ids, mask, make(None)))
    d, e = (run(model, ids, mask, make(torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(d, e)


@pytest.mark.parametrize("rule", ["sample_and_match", "multi_draft", "traversal"])
def test_a_rows_text_does_not_depend_on_its_batch(rule, threads):
    """Alone, among others, in another order, with another number of threads; equal prompts in a batch differ."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(4, 9)
    whole = run(model, ids, mask, sampled(WITHOUT, rule, seed=4), eos_token_id=[])
    for row in range(4):
        threads(1 + row % 3)
        start = int((mask[row] == 0).sum())
        alone = run(
            model,
            ids[row : row + 1, start:],
            mask[row : row + 1, start:],
            sampled(WITHOUT, rule, seed=4),
            eos_token_id=[],
        )
        assert torch.equal(alone[0, -N:], whole[row, -N:])
    order = [2, 0, 3, 1]
    shuffled = run(model, ids[order], mask[order], sampled(WITHOUT, rule, seed=4), eos_token_id=[])
    assert torch.equal(shuffled[:, -N:], whole[order, -N:])
    twice = run(model, ids[[0, 0]], mask[[0, 0]], sampled(WITHOUT, rule, seed=4), eos_token_id=[])
    assert torch.equal(twice[0, -N:], whole[0, -N:]) and not torch.equal(twice[0], twice[1])


def test_seeds():
    assert row_seeds(5, 2) == [5, 5] and row_seeds([1, -2], 2) == [1, -2]
    with pytest.raises(ValueError, match="seed must be one number, or one per row, 3, got 2"):
        row_seeds([1, 2], 3)
    model = tiny.model("llama")
    ids, mask = tiny.prompts(2, 5)
    both = run(model, ids, mask, bw.TreeSpeculation(seed=[8, 9]), eos_token_id=[])
    assert torch.equal(both[0], run(model, ids, mask, bw.TreeSpeculation(seed=8), eos_token_id=[])[0])
    assert torch.equal(both[1], run(model, ids, mask, bw.TreeSpeculation(seed=9), eos_token_id=[])[1])
    prompts = [np.int32([1, 2]), np.int32([1, 2]), np.int32([1, 2, 3])]
    u = Noise([0, 0, 0], prompts).at_positions(torch.zeros(3, 1).long())[:, 0, 0].tolist()
    assert len(set(u)) == 3


VOCABULARY = 16
ROWS = 2000
#: (drafter, rule)
COMBINATIONS = [
    ("trie", None),
    ("suffix", None),
    ("prompt_lookup", None),
    ("random", None),
    ("random", "each_child"),
    ("random", "one_coin"),
    ("drawn without", None),
    ("drawn without", "multi_draft"),
    ("drawn without", "sample_and_match"),
    ("drawn without", "each_child"),
    ("drawn with", None),
    ("drawn with", "multi_draft"),
    ("drawn chain", "chain"),
    ("drawn chain", "block"),
    ("drawn chain", None),
    ("model", None),
    ("model that draws", None),
    ("model that draws", "multi_draft"),
]


@cache
def small(name):
    """A tiny model of 16 tokens with a peaked law."""
    config = tiny.CONFIGS[name]()
    config.vocab_size = VOCABULARY
    torch.manual_seed(11)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    model.generation_config.pad_token_id = 0
    return model


def make_drafter(name):
    if name == "random":
        return RandomTrees([[3, 5, 7]] * ROWS, luck=0.8, vocabulary=VOCABULARY)
    if name == "model":
        return Model(small("mistral"), width=2, min_score=0.0)
    if name == "model that draws":
        return Model(small("mistral"), width=3, depth=3, draws="without_replacement")
    if name == "drawn chain":
        return ModelDrafter(small("mistral"), WITH, width=1, depth=3)
    if name.startswith("drawn"):
        return ModelDrafter(small("mistral"), WITH if name.endswith("with") else WITHOUT)
    return name


@cache
def law_of_three(temperature, top_k):
    """The small llama's law of the three tokens after the prompt, f64[4096]."""
    prompt, model = [5, 9, 3, 14, 5, 9, 3], small("llama")

    def laws(texts):
        with torch.no_grad():
            scores = model(torch.tensor(texts)).logits[:, -1] / temperature
        return logits_process.TopKLogitsWarper(top_k)(None, scores).double().softmax(-1)

    tokens = range(VOCABULARY)
    first = laws([prompt])[0]
    second = laws([[*prompt, t] for t in tokens])
    third = laws([[*prompt, *pair] for pair in product(tokens, tokens)]).view(VOCABULARY, VOCABULARY, VOCABULARY)
    return (first[:, None, None] * second[:, :, None] * third).flatten()


@pytest.mark.parametrize(("name", "rule"), [("plain sampler", None), *COMBINATIONS])
def test_histograms_of_generated_texts(name, rule):
    """The first three tokens of 2000 rows against the model's own law, with warpers; drafts come from another model."""
    options = {"temperature": 0.9, "top_k": 12}
    ids = torch.tensor([[5, 9, 3, 14, 5, 9, 3]]).expand(ROWS, -1).contiguous()
    seed = 100 + len(name)
    decoder = (
        bw.PositionKeyedSampler(seed)
        if name == "plain sampler"
        else bw.TreeSpeculation(make_drafter(name), max_nodes=8, adaptive=False, rule=rule, seed=seed)
    )
    out = run(small("llama"), ids, torch.ones_like(ids), decoder, max_new_tokens=3, eos_token_id=[], **options)
    a, b, c = out[:, -3:].T
    counts = torch.bincount((a * VOCABULARY + b) * VOCABULARY + c, minlength=VOCABULARY**3)
    statistic, limit = chi_square(counts, law_of_three(**options), ROWS)
    assert statistic < limit
    if name not in ("plain sampler", "trie", "suffix", "prompt_lookup"):
        assert decoder.stats.accepted > ROWS / 10
    drawn = "draw" in name
    if name != "plain sampler" and rule is None:
        assert decoder.stats.rule == ("traversal" if drawn else "sample_and_match")


def test_a_drafter_that_draws_is_held_to_its_promise():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 3)

    class Silent(ModelDrafter):
        def propose(self, budgets):
            trees = super().propose(budgets)
            for tree in trees:
                tree.draft = tree.draft_index = None
            return trees

    class Narrow(ModelDrafter):
        def _law(self, text):
            return super()._law(text)[:16].softmax(-1)

    class Greedy(ModelDrafter):
        def propose(self, budgets):
            return super().propose([budget + 4 for budget in budgets])

    for kind, message in (
        (Silent, "must hand over what it drew from, as draft"),
        (Narrow, r"draft must have shape \[R, 128\], got \(3, 16\)"),
        (Greedy, "must keep to its budget of 5 nodes, got 7"),
    ):
        spec = bw.TreeSpeculation(kind(tiny.model("mistral"), WITHOUT), max_nodes=5 if kind is Greedy else 8)
        with pytest.raises(ValueError, match=message):
            run(model, ids, mask, spec)
    with pytest.raises(ValueError, match="rule traversal is not for drafts drawn deterministic"):
        run(model, ids, mask, bw.TreeSpeculation("trie", rule="traversal"))
    with pytest.raises(ValueError, match="PositionKeyedSampler samples: pass do_sample=True"):
        run(model, ids, mask, bw.PositionKeyedSampler(1), do_sample=False)


@pytest.mark.parametrize("draws", [WITH, WITHOUT])
def test_greedy_with_a_drafter_that_draws(draws):
    """At temperature 0 every exact rule is greedy."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(3, 8)
    plain = run(model, ids, mask, None, do_sample=False, top_k=None)
    for rule in (None, "traversal", "chain"):
        spec = sampled(draws, rule)
        assert torch.equal(plain, run(model, ids, mask, spec, do_sample=False, top_k=None))
        assert spec.stats.rule == "greedy"


def test_lossy_rules_say_so():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(2, 8)
    for rule in (acceptance.typical_lossy(), acceptance.policy_lossy("surprisal", 3.0), "typical_lossy"):
        spec = bw.TreeSpeculation(RandomTrees([[3] * 40] * 2), rule=rule, adaptive=False)
        run(model, ids, mask, spec)
        assert spec.stats.rule.endswith("_lossy") and not spec.stats.exact


def test_scores_of_sampled_texts():
    """output_scores under speculation: raw logits and processed scores of every emitted token, as plain decoding has
    them."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(2, 4)
    options = {"output_scores": True, "output_logits": True, "temperature": 0.7, "eos_token_id": []}
    options["return_dict_in_generate"] = True
    seen = []

    class Record(logits_process.LogitsProcessor):
        def __call__(self, ids, scores):
            seen.append(scores.clone())
            return scores

    plain = run(model, ids, mask, bw.PositionKeyedSampler(3), logits_processor=[Record()], **options)
    truth = [row[ids.shape[1] :].tolist() for row in plain.sequences]
    ours = run(model, ids, mask, bw.TreeSpeculation(RandomTrees(truth), seed=3, adaptive=False), **options)
    assert torch.equal(ours.sequences, plain.sequences) and len(ours.logits) == len(seen) == N
    for raw, scores, expected in zip(ours.logits, ours.scores, seen, strict=True):
        torch.testing.assert_close(raw, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores, expected / 0.7, rtol=1e-4, atol=1e-4)
