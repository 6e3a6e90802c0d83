"""Drafters that compute: draft models, early exits, recycled tokens, lookahead, and mixtures, inside the decoder."""

import copy

import numpy as np
import pytest
import torch

import branchwise as bw
import tiny
from branchwise import DrawKind
from branchwise.attention import pack_mask
from branchwise.drafters import (
    DraftRequest,
    EarlyExit,
    Hybrid,
    Jacobi,
    Lookahead,
    Model,
    Needs,
    Suffix,
    TokenRecycling,
    Verified,
)
from branchwise.drafters.beg_mab import BegMab
from branchwise.drafters.growth import grow_best_first
from branchwise.drafters.hybrid import merge
from branchwise.layers import decoder_layers
from branchwise.tree import FOREIGN, RowTree
from test_sampling import run

N = 40


def noisy(model, amount):
    """A draft model that is mostly right."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return draft


#: name: drafter for a target
DRAFTERS = {
    "model": lambda m: Model(noisy(m, 0.2), min_score=0.0),
    "model chain": lambda m: Model(noisy(m, 0.2), width=1, min_score=0.0),
    "model static": lambda m: Model(noisy(m, 0.2), growth="static"),
    "model of another kind": lambda m: Model(tiny.model("mistral"), min_score=0.0),
    "model that draws": lambda m: Model(noisy(m, 0.2), draws="without_replacement"),
    "early exit": lambda m: EarlyExit(1, min_score=0.0),
    "early exit, several": lambda m: EarlyExit((2, 1), width=2, min_score=0.0),
    "early exit tree": lambda m: EarlyExit(2, width=3, min_score=0.0),
    "early exit static": lambda m: EarlyExit(2, width=3, growth="static"),
    "token recycling": lambda m: TokenRecycling(),
    "jacobi": lambda m: Jacobi(),
    "lookahead": lambda m: Lookahead(),
    "hybrid": lambda m: Hybrid(Suffix(), TokenRecycling(), Lookahead(window=3)),
    "hybrid with a model": lambda m: Hybrid(Suffix(), Model(noisy(m, 0.2), min_score=0.0), enough=1.0),
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_texts_are_the_targets(drafter, name, adaptive):
    model = tiny.model(name)
    spec = bw.TreeSpeculation(DRAFTERS[drafter](model), adaptive=adaptive)
    for seed, batch in ((3, 1), (7, 4)):
        ids, mask = tiny.prompts(batch, seed)
        plain = run(model, ids, mask, None, do_sample=False, top_k=None, max_new_tokens=N)
        for _ in range(2):  # what a drafter learned must not change anything
            assert torch.equal(plain, run(model, ids, mask, spec, do_sample=False, top_k=None, max_new_tokens=N))
    assert adaptive or spec.stats.accepted > 0


@pytest.mark.parametrize("name", [n for n in tiny.CONFIGS if n != "gemma4"])
def test_early_exit_of_every_architecture(name):
    model = tiny.model(name)
    ids, mask = tiny.prompts(3, 5)
    plain = run(model, ids, mask, None, do_sample=False, top_k=None)
    for layers, width in ((1, 1), (2, 3)):
        spec = bw.TreeSpeculation(EarlyExit(layers, width=width, min_score=0.0), adaptive=False)
        assert torch.equal(plain, run(model, ids, mask, spec, do_sample=False, top_k=None))
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))


def test_several_exits(monkeypatch):
    """All are tried, and the one that has gained the most is taken; the text is the target's."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(2, 3)
    plain = run(model, ids, mask, None, do_sample=False, top_k=None, max_new_tokens=N)
    rounds = []
    record = BegMab.record

    def noted(self, batch_size, arm, emitted, seconds):
        rounds.append((arm, emitted))
        assert seconds > 0
        record(self, batch_size, arm, emitted, 1.0 if arm == 1 else 1e-3)  # the deeper one is the faster one

    monkeypatch.setattr(BegMab, "record", noted)
    for epsilon in (1.0, 0.0):
        drafter = EarlyExit((2, 1, 2), min_score=0.0)
        assert drafter.exits == [1, 2]
        drafter.choice.epsilon = epsilon
        spec = bw.TreeSpeculation(drafter, adaptive=False)
        rounds.clear()
        assert torch.equal(plain, run(model, ids, mask, spec, do_sample=False, top_k=None, max_new_tokens=N))
        taken = [arm for arm, _ in rounds]
        assert set(taken) == {1, 2} and sum(emitted for _, emitted in rounds) <= 2 * N
        if epsilon == 0.0:
            # Rewards are kept per batch size, and rows leave: each exit is tried first, once per size.
            assert taken.count(1) <= 2 and len(taken) > 4


@pytest.mark.parametrize("drafter", [d for d in DRAFTERS if d != "model that draws"])
def test_sampled_texts_are_the_plain_samplers(drafter):
    model = tiny.model("llama")
    ids, mask = tiny.prompts(3, 2)
    options = {"max_new_tokens": N, "temperature": 0.8, "top_p": 0.9}
    plain = run(model, ids, mask, bw.PositionKeyedSampler(5), **options)
    spec = bw.TreeSpeculation(DRAFTERS[drafter](model), adaptive=False, seed=5)
    assert torch.equal(plain, run(model, ids, mask, spec, **options))


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_rows_that_end_early_and_results_with_scores(drafter):
    """Rows leave the batch one by one; with return_dict they stay in it."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(4, 12)
    plain = run(model, ids, mask, None, do_sample=False, top_k=None, max_new_tokens=N)
    ends = [int(row[ids.shape[1] + 3 * (b + 1)]) for b, row in enumerate(plain)]  # tokens that come up early
    options = {"do_sample": False, "top_k": None, "max_new_tokens": N, "eos_token_id": ends}
    expected = run(model, ids, mask, None, **options)
    spec = bw.TreeSpeculation(DRAFTERS[drafter](model), adaptive=False)
    assert torch.equal(expected, run(model, ids, mask, spec, **options))
    result = run(model, ids, mask, spec, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(expected, result.sequences)


class Counter:
    """Counts the tokens that each decoder layer of a model sees."""

    def __init__(self, model):
        self.tokens = [0] * len(decoder_layers(model))
        self.hooks = [layer.register_forward_pre_hook(self.count(i)) for i, layer in enumerate(decoder_layers(model))]

    def count(self, i):
        def hook(module, args):
            self.tokens[i] += args[0].shape[0] * args[0].shape[1]

        return hook


def test_a_perfect_draft_model_is_always_right_and_computes_every_token_once():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 3)
    draft = copy.deepcopy(model)
    counter = Counter(draft)
    spec = bw.TreeSpeculation(Model(draft, width=1, depth=7, min_score=0.0), adaptive=False)
    new = 1 + 5 * 8  # the prompt's token, then rounds of seven accepted and a bonus
    run(model, ids, mask, spec, do_sample=False, top_k=None, max_new_tokens=new, eos_token_id=[])
    assert spec.stats.acceptance == 1.0 and spec.stats.forwards == 1 + 5
    # Prompt, then all text but the last round's last drafted token and bonus.
    assert counter.tokens == [int(mask.sum()) + new - 2] * 3


def test_early_exit_computes_no_layer_twice():
    """The card's counter: with chains, layers see every verified node once, and the exit's tail makes it exact."""
    model = copy.deepcopy(tiny.model("llama"))
    with torch.no_grad():  # layers behind the first pass hidden states on: every draft is right
        for layer in decoder_layers(model)[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    ids, mask = tiny.prompts(1, 3)
    seen = [0, 0, 0]
    for i, layer in enumerate(decoder_layers(model)):
        attention = layer.self_attn

        def hook(module, args, kwargs, i=i):
            seen[i] += kwargs["hidden_states"].shape[1]

        attention.register_forward_pre_hook(hook, with_kwargs=True)
    spec = bw.TreeSpeculation(EarlyExit(1, depth=7, min_score=0.0), adaptive=False)
    run(model, ids, mask, spec, do_sample=False, top_k=None, max_new_tokens=41, eos_token_id=[])
    assert spec.stats.acceptance == 1.0 and spec.stats.forwards == 1 + 5
    assert seen == [int(mask.sum()) + 5 * 8] * 3


def test_early_exit_trees_compute_leaves_once_too():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 3)
    seen = [0, 0, 0]
    hooks = []
    for i, layer in enumerate(decoder_layers(model)):

        def hook(module, args, kwargs, i=i):
            seen[i] += kwargs["hidden_states"].shape[1]

        hooks.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    proposed = []

    class Watched(EarlyExit):
        def begin(self, request):
            session = super().begin(request)
            propose = session.propose
            session.propose = lambda budgets: proposed.append(propose(budgets)) or proposed[-1]
            return session

    spec = bw.TreeSpeculation(Watched(1, width=3, growth="static"), adaptive=False, max_nodes=12)
    run(model, ids, mask, spec, do_sample=False, top_k=None, max_new_tokens=20, eos_token_id=[])
    for hook in hooks:
        hook.remove()
    # The last trees are cut to the length that is left after they were drafted.
    assert seen[0] == int(mask.sum()) + sum(len(trees[0]) for trees in proposed)
    assert seen[1] == seen[2] == int(mask.sum()) + spec.stats.drafted + spec.stats.forwards - 1


def test_growth_keeps_the_likeliest_paths():
    """Against all paths of a tiny vocabulary, as deep as every path is expanded."""
    generator = torch.Generator().manual_seed(0)
    V, depth = 5, 2
    table = torch.randn(V, V, generator=generator) * 2  # logits by the last token

    class Bigram:
        def root(self):
            return table[torch.tensor([2])]

        def expand(self, tokens, depths, ancestors):
            return table[tokens]

    tree = grow_best_first(Bigram(), [2], [20], torch.tensor([4]), width=V, depth=depth, min_score=0.0)[0]
    law = table.softmax(-1)  # the EOS 4 is never drafted, and keeps its part
    paths = {}
    level = {(): 1.0}
    for _ in range(depth):
        level = {(*path, t): p * float(law[path[-1] if path else 2, t]) for path, p in level.items() for t in range(4)}
        paths |= level
    best = sorted(paths.values(), reverse=True)[:19]
    assert len(tree) == 20 and tree.parents[0] == -1
    np.testing.assert_allclose(tree.scores[1:], best, rtol=1e-5)
    for node in range(1, 20):
        assert paths[tuple(tree.path(node))] == pytest.approx(float(tree.scores[node]), rel=1e-5)


def test_pack_mask():
    ancestors = torch.rand(2, 70, 70) < 0.5
    packed = pack_mask(ancestors)
    bits = (packed[..., None] >> torch.arange(64)) & 1
    assert torch.equal(bits.flatten(-2)[..., :70].bool(), ancestors) and packed.shape == (2, 70, 2)


def test_token_recycling_remembers_the_last_successors():
    drafter = TokenRecycling(successors=2, depth=3)
    session = drafter.begin(DraftRequest([np.int32([7])], frozenset({9})))
    row = RowTree(np.int32([7, 3, 3]), np.int32([-1, 0, 1]), np.ones(3, np.float32))
    tree = bw.TokenTree([row], torch.zeros(1).int())
    logits = torch.zeros(1, 3, 12)
    logits[0, 0, [3, 5]] = torch.tensor([2.0, 1.0])
    logits[0, 1, [1, 2]] = torch.tensor([2.0, 1.0])
    logits[0, 2, [9, 4, 8]] = torch.tensor([3.0, 2.0, 1.0])  # the EOS 9 moves out of the way
    nodes = torch.tensor([[0, -1, -1]]).int()
    session.observe(Verified([[7]], tree, nodes, torch.tensor([1]).int(), logits))
    table = drafter.table(frozenset({9}), 12)
    assert table[7].tolist() == [3, 5] and table[3].tolist() == [4, 8] and (table[1] == -1).all()
    draft = session.propose([6])[0]
    paths = {tuple(draft.path(node)) for node in range(1, len(draft))}
    assert {(3,), (5,), (3, 4), (3, 8)} == paths
    assert len(session.propose([2])[0]) == 2


def test_merge():
    a = RowTree(np.int32([1, 5, 6]), np.int32([-1, 0, 1]), np.float32([1, 0.5, 0.2]), ids=np.int32([-1, 0, 1]))
    b = RowTree(np.int32([1, 7, 5, 6, 8]), np.int32([-1, 0, 0, 2, 3]), np.float32([1, 0.6, 0.4, 0.3, 0.3]))
    tree, names = merge([a, b], 5)
    assert [tuple(tree.path(n)) for n in range(5)] == [(), (7,), (5,), (5, 6), (5, 6, 8)]
    # Of the root's children a expects half, b all; of 5's, a has 6 come next with 0.4, b with 0.75.
    seven, five = ((0.6 / 1.5) + 0.6) / 2, ((0.5 * 0.5 + 0.4) / 1.5 + 0.5) / 2
    six = five * ((0.4 * 0.4 + 0.75 * 0.75) / 1.15 + 0.75) / 2
    assert tree.scores.tolist() == pytest.approx([1, seven, five, six, six])
    assert names[0, tree.ids].tolist() == [-1, FOREIGN, 0, 1, FOREIGN]
    assert names[1, tree.ids].tolist() == [0, 1, 2, 3, 4]
    assert len(merge([a, b], 2)[0]) == 2
    b.fixed = 3
    tree, _ = merge([a, b], 5)
    assert tree.fixed == 3 and len(tree.first(1)) == 3


def test_what_drafters_see_of_the_target():
    """Logits and hidden states at the nodes, for those who ask."""
    model = tiny.model("llama")
    seen = []

    class Curious(Suffix):
        needs = Needs.LOGITS | Needs.HIDDEN_STATES

        def begin(self, request):
            session = super().begin(request)
            observe = session.observe

            def watch(verified):
                seen.append(verified)
                observe(verified)

            session.observe = watch
            return session

    ids, mask = tiny.prompts(2, 5)
    run(model, ids, mask, bw.TreeSpeculation(Curious(), adaptive=False), do_sample=False, top_k=None)
    for verified in seen:
        B, T = verified.tree.shape
        assert verified.logits.shape == (B, T, 128) and verified.hidden_states.shape == (B, T, 32)
        torch.testing.assert_close(model.lm_head(verified.hidden_states), verified.logits)
    assert any(len(verified.path(0)) > 1 for verified in seen)


def test_options_are_checked():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 3)
    for make, message in (
        (lambda: Model(model, width=0), "width and depth must be at least 1, got 0 and 6"),
        (lambda: Model(model, growth="wild"), "growth must be 'best_first' or 'static', got 'wild'"),
        (lambda: Model(model, draws="with_replacement"), "draws must be 'deterministic' or"),
        (lambda: EarlyExit(0), "exit_layer, width and depth must be at least 1, got 0"),
        (lambda: EarlyExit([3, 0]), r"exit_layer, width and depth must be at least 1, got \[3, 0\]"),
        (lambda: EarlyExit([]), r"exit_layer, width and depth must be at least 1, got \[\]"),
        (lambda: EarlyExit(1, growth="wild"), "growth must be"),
        (lambda: TokenRecycling(successors=0), "successors and depth must be at least 1, got 0 and 6"),
        (lambda: Jacobi(0), "length must be at least 1, got 0"),
        (lambda: Lookahead(ngram=1), "window and guesses must be at least 1 and ngram at least 2, got 7, 7 and 1"),
        (lambda: Hybrid(), "drafters must name at least one"),
        (lambda: Hybrid(EarlyExit(1)), "drafters must be deterministic and leave the target alone, got EarlyExit"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for drafter, message in (
        (EarlyExit(3), "exit_layer must be below the target's 3 layers, got 3"),
        (EarlyExit((1, 4)), "exit_layer must be below the target's 3 layers, got 4"),
        (Model(tiny.model("llama")), None),
    ):
        spec = bw.TreeSpeculation(drafter)
        if message is None:
            run(tiny.model("qwen3"), ids, mask, spec)
            continue
        with pytest.raises(ValueError, match=message):
            run(model, ids, mask, spec)
    with pytest.raises(ValueError, match="layers that read the keys of earlier ones"):
        run(tiny.model("gemma4"), ids, mask, bw.TreeSpeculation(EarlyExit(1)))
    assert Model(model, draws="without_replacement").draws is DrawKind.WITHOUT_REPLACEMENT


def test_another_vocabulary_is_refused():
    config = tiny.CONFIGS["llama"]()
    config.vocab_size = 3000
    import transformers as tf

    other = tf.AutoModelForCausalLM.from_config(config)
    ids, mask = tiny.prompts(1, 3)
    with pytest.raises(ValueError, match="their vocabularies have 3000 and 128 tokens"):
        run(tiny.model("llama"), ids, mask, bw.TreeSpeculation(Model(other)))
    # The same tokenizer, padded to another size.
    config.vocab_size = 192
    padded = tf.AutoModelForCausalLM.from_config(config).eval()
    plain = run(tiny.model("llama"), ids, mask, None, do_sample=False, top_k=None)
    spec = bw.TreeSpeculation(Model(padded, min_score=0.0), adaptive=False)
    assert torch.equal(plain, run(tiny.model("llama"), ids, mask, spec, do_sample=False, top_k=None))
