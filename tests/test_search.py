"""Searches over a KV tree: each against the rule applied to whole texts that plain sampling draws, in fp32."""

import itertools
import threading
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList, SuppressTokensLogitsProcessor

import branchwise as bw
import tiny
from branchwise.attention import use_attention
from branchwise.decoding.branches import Branches
from branchwise.decoding.search import majority
from branchwise.drafters import make_drafter

MODELS = ["llama", "gemma3"]
DRAFTERS = ["none", "suffix"]
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 24}


def plain(model, ids, mask, n, seed, **options):
    """Continuations [B][n] that transformers' own loop draws, cut behind their ends."""
    sampler = bw.PositionKeyedSampler(seed=seed)
    out = model.generate(
        ids, attention_mask=mask, custom_generate=sampler, num_return_sequences=n, **{**SAMPLING, **options}
    )[:, ids.shape[1] :]
    rows = []
    for row in out:
        ends = (row == 2).nonzero().flatten()
        rows.append(row[: int(ends[0]) + 1] if len(ends) else row)
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def by_sum(prompt, texts):
    return [float(text.sum()) % 97 for text in texts]


def equal(ours, theirs):
    assert [text.tolist() for text in ours] == [text.tolist() for text in theirs]


def last_of_four(text):
    """Thinking is over at a token that four divides, which these models say now and then."""
    return bool((text % 16 == 0).any())


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", MODELS)
def test_best_of_n(name, drafter):
    model = tiny.model(name)
    ids, mask = tiny.prompts(3, 0)
    search = bw.BestOfN(5, by_sum, seed=7, drafter=drafter)
    options = {"repetition_penalty": 1.3}  # looks at each branch's own text
    out = model.generate(ids, attention_mask=mask, custom_generate=search, **SAMPLING, **options)
    for b, texts in enumerate(plain(model, ids, mask, 5, 7, **options)):
        best = sorted(texts, key=lambda text: -by_sum(None, [text])[0])
        equal(search.found[b].texts, best)
        said = out[b, ids.shape[1] :]
        assert said[: len(best[0])].tolist() == best[0].tolist() and (said[len(best[0]) :] == 0).all()
        assert search.found[b].scores == sorted(by_sum(None, texts), reverse=True)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("m", [1, 3, 6])
def test_short_m_at_k(m, drafter):
    model = tiny.model("llama")
    ids, mask = tiny.prompts(4, 1)
    search = bw.ShortMAtK(m, 6, last_of_four, answer=lambda text: int(text[-1]) % 3, seed=3, drafter=drafter)
    model.generate(ids, attention_mask=mask, custom_generate=search, **SAMPLING)
    for b, texts in enumerate(plain(model, ids, mask, 6, 3)):

        def thought_at(text):
            return next((i for i in range(1, len(text) + 1) if last_of_four(text[:i])), None)

        first = sorted((i for i, text in enumerate(texts) if thought_at(text)), key=lambda i: thought_at(texts[i]))[:m]
        first = first or list(range(6))
        votes = Counter(int(texts[i][-1]) % 3 for i in first)
        winners = [a for a, count in votes.items() if count == max(votes.values())]
        best = min((len(texts[i]), place) for place, i in enumerate(first) if int(texts[i][-1]) % 3 in winners)[1]
        answer = int(texts[first[best]][-1]) % 3
        shortest = min((len(texts[i]), place) for place, i in enumerate(first) if int(texts[i][-1]) % 3 == answer)[1]
        equal(search.found[b].texts[:1], [texts[first[shortest]]])
        assert sorted(text.tolist() for text in search.found[b].texts) == sorted(texts[i].tolist() for i in first)


def test_short_m_at_k_stops_the_others():
    """The chains that are given up are not written to their ends."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 5)
    texts = plain(model, ids, mask, 6, 11, max_new_tokens=60, eos_token_id=None)[0]
    at = sorted(next(i for i in range(1, 61) if last_of_four(text[:i])) for text in texts)
    search = bw.ShortMAtK(1, 6, last_of_four, seed=11)
    model.generate(
        ids, attention_mask=mask, custom_generate=search, **{**SAMPLING, "max_new_tokens": 60}, eos_token_id=None
    )
    rounds = at[0] + (60 - at[0])  # all until the first is done, then that one alone
    assert search.found[0].stats.emitted == 6 * at[0] + 60 - at[0] < 6 * rounds


def test_best_of_majority():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(3, 2)

    def answer(text):
        return int(text[-1]) % 4

    search = bw.BestOfMajority(9, by_sum, frequency=0.25, answer=answer, k=2, seed=5)
    model.generate(ids, attention_mask=mask, custom_generate=search, **SAMPLING)
    for b, texts in enumerate(plain(model, ids, mask, 9, 5)):
        counts = Counter(map(answer, texts))
        least = min(0.25 * 9, max(counts.values()))
        first = [next(t for t in texts if answer(t) == a) for a in counts if counts[a] >= least]
        equal(search.found[b].texts, sorted(first, key=lambda t: -by_sum(None, [t])[0])[:2])


def test_majority_breaks_ties_by_length():
    assert majority(["a", "b", "b", "a"], [9, 8, 7, 10]) == "b"
    assert majority(["a", "b", "c"], [9, 8, 7]) == "c"
    assert majority(["a", "b", "a"], [9, 1, 9]) == "a"


def grove(model, prompt, new=12, width=1, allowed=None, **options):
    """Branches over a prompt, for tests that drive them by hand."""
    config = GenerationConfig(do_sample=True, pad_token_id=0)
    processors = [] if allowed is None else [SuppressTokensLogitsProcessor([t for t in range(128) if t not in allowed])]
    branches = Branches(
        model,
        config,
        processors,
        options.pop("stopping", StoppingCriteriaList()),
        len(prompt) + new,
        0,
        options.pop("seed", 0),
        make_drafter(options.pop("drafter", "none")),
        **options,
    )
    return branches, branches.root(prompt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_a_branch_says_depends_on_no_other(dtype):
    """One of seven forks alone: the same tokens and the same keys, bit for bit."""
    model = tiny.model("llama", dtype)
    prompt = torch.randint(3, 100, (400,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), use_attention(model):
        all_of, root = grove(model, prompt, 30)
        seven = all_of.fork(root, 7)
        all_of.write(seven, 7)
        for i in (0, 3, 6):
            one_of, root = grove(model, prompt, 30)
            forks = one_of.fork(root, 7)
            for fork in forks:
                one_of.renumber(fork)
            one_of.prune(forks[:i] + forks[i + 1 :])
            one_of.write([forks[i]], 7)
            equal([one_of.said(forks[i])], [all_of.said(seven[i])])
            for layer in range(3):
                for a, b in zip(one_of.tree.branch(layer, forks[i]), all_of.tree.branch(layer, seven[i]), strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_forks_diverge_and_pages_return(drafter):
    model = tiny.model("llama")
    prompt = torch.randint(3, 100, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), use_attention(model):
        branches, root = grove(model, prompt, 60, drafter=drafter)
        rows = branches.fork(root, 3)
        branches.write(rows, 4, most=10)
        rows = branches.resample(rows, [0, 0, 2])
        equal(branches.said(rows[0])[None], branches.said(rows[1])[None])
        branches.write(rows, 4, most=10)
        assert not torch.equal(branches.said(rows[0]), branches.said(rows[1]))
        assert all(len(branches.said(row)) == 20 for row in rows)
        branches.append(rows[1], torch.tensor([5, 6, 7]))
        branches.truncate(rows[2], 55)
        branches.evict(rows[0], 49)
        branches.write(rows, 2)  # in turns, one of them idle
        assert [len(branches.said(row)) for row in rows] == [60, 60, 60]
        assert branches.said(rows[1])[20:23].tolist() == [5, 6, 7]
        assert branches.ended == set(rows)
        branches.prune([root, *rows])
        assert branches.tree.num_pages == 0 and not branches.texts and not branches.ended


def law(model, prompt, new, allowed, eos=None):
    """Every text over the allowed tokens and its probability under the model."""
    texts = [()]
    done = []
    for _ in range(new):
        texts = [(*text, token) for text in texts for token in allowed]
        done += [text for text in texts if text[-1] == eos]
        texts = [text for text in texts if text[-1] != eos]
    result = {}
    for text in done + texts:
        ids = torch.cat([prompt, torch.tensor(text)])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1, list(allowed)].double()
        chosen = [list(allowed).index(token) for token in text]
        result[text] = float(logits.log_softmax(-1)[range(len(text)), chosen].sum().exp())
    return result


def partial_reward(prompt, texts):
    """In (0, 1), from the last two tokens and the length."""
    return [0.2 + 0.6 * ((int(t[-1]) * 5 + int(t[-2:].sum()) * 3 + len(t)) % 11) / 10 for t in texts]


def posterior(model, prompt, new, allowed, eos=None):
    weights = {}
    for text, p in law(model, prompt, new, allowed, eos).items():
        for n in range(1, len(text) + 1):
            r = partial_reward(None, [torch.tensor(text[:n])])[0]
            p *= r / (1 - r)
        weights[text] = p
    total = sum(weights.values())
    return {text: p / total for text, p in weights.items()}


def particle_distance(finished, allowed, eos, n=4096, seed=0, **options):
    model = tiny.model("llama")
    prompt = torch.tensor([5, 9, 17, 4])
    stopping = StoppingCriteriaList([] if eos is None else [lambda ids, scores, **kw: ids[:, -1] == eos])
    search = bw.ParticleFilter(n, partial_reward, lambda text: True, finished=finished, **options)
    with torch.no_grad(), use_attention(model):
        branches, root = grove(model, prompt, 3, allowed=allowed, stopping=stopping, seed=seed)
        found = search.search(branches, root)
    shares = Counter()
    for text, weight in zip(found.texts, found.scores, strict=True):
        shares[tuple(text.tolist())] += weight
    exact = posterior(model, prompt, 3, allowed, eos)
    assert abs(sum(shares.values()) - 1) < 1e-9
    return sum(abs(shares[text] - exact.get(text, 0)) for text in {*shares, *exact}) / 2


@pytest.mark.parametrize("systematic", [False, True])
def test_particles_follow_the_posterior(systematic):
    """Texts of one length: every setting is exact as n grows."""
    assert particle_distance("aside", (3, 11), None, systematic=systematic) < 0.03


def test_particles_that_end_early():
    """Only the neutral weight keeps to the law; the published settings don't, and this test would notice."""
    assert particle_distance("exact", (2, 3, 11), 2) < 0.03
    assert particle_distance("kept", (2, 3, 11), 2) > 0.045
    assert particle_distance("aside", (2, 3, 11), 2) > 0.045


class Toy:
    """Branches of a toy: step i of a fork is its number among its siblings, and texts end after ``depth`` steps."""

    def __init__(self, depth):
        self.depth, self.cancelled, self.seed, self.padding = depth, False, 0, 0
        self.prompt = torch.empty(0, dtype=torch.int64)
        self.texts, self.ended, self.sibling = {0: torch.empty(0, dtype=torch.int64)}, set(), {}
        self.written = []

    def said(self, branch):
        return self.texts[branch]

    def fork(self, branch, n=1):
        new = [max(self.texts) + 1 + i for i in range(n)]
        for i, fork in enumerate(new):
            self.texts[fork], self.sibling[fork] = self.texts[branch], i
        return new

    def resample(self, branches, ancestors):
        new = [max(self.texts) + 1 + i for i in range(len(ancestors))]
        places = Counter()
        for fork, a in zip(new, ancestors, strict=True):
            self.texts[fork], self.sibling[fork] = self.texts[branches[a]], places[a]
            places[a] += 1
        self.prune(branches)
        return new

    def prune(self, branches):
        for branch in branches:
            del self.texts[branch]

    def evict(self, branch, length):
        assert branch in self.texts

    def write(self, branches, width, ends=None, most=None, **options):
        self.written.append((len(branches), width, most))
        for branch in branches:
            self.texts[branch] = torch.cat([self.texts[branch], torch.tensor([self.sibling[branch]])])
            if len(self.texts[branch]) == self.depth:
                self.ended.add(branch)


def falling(prompt, texts):
    """A reward that never rises along a text."""
    rewards = []
    for text in texts:
        r = 1.0
        for i, token in enumerate(text.tolist()):
            r *= 1 - ((token * 7 + i * 3 + int(text[: i + 1].sum()) * 5) % 9) / 20
        rewards.append(r)
    return rewards


def cost(text):
    """g + h of a whole text by the card's definition, the prompt at h = 1."""
    g, h = 0.0, 1.0
    for n in range(1, len(text) + 1):
        r = falling(None, [torch.tensor(text[:n])])[0]
        g, h = g + max(0.0, 1 - r - h), 1 - r
    return g + h


@pytest.mark.parametrize("width, depth", [(2, 6), (3, 4), (4, 3)])
def test_a_star_finds_the_optimum(width, depth):
    best = min(cost(text) for text in itertools.product(range(width), repeat=depth))
    search = bw.AStar(width, falling, lambda text: True, max_expansions=10_000)
    found = search.search(Toy(depth), 0)
    assert -found.scores[0] == pytest.approx(best) and cost(found.texts[0].tolist()) == pytest.approx(best)
    assert found.scores == sorted(found.scores, reverse=True)
    every = sum(width**level for level in range(depth))
    assert len(found.trace) < every  # not by trying all
    assert all(step["g"] >= 0 for step in found.trace)


def test_a_star_gives_kv_back():
    """Frontier texts without KV are read again, and the result is the same."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(2, 3)
    found = []
    for resident in (None, 2, 0):
        search = bw.AStar(3, partial_reward, lambda text: len(text) >= 3, max_expansions=6, resident=resident, seed=1)
        model.generate(ids, attention_mask=mask, custom_generate=search, **SAMPLING)
        found.append(search.found)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            equal(a.texts, b.texts)
            assert a.scores == pytest.approx(b.scores) and a.trace == b.trace
    assert found[2][0].peak_bytes < found[0][0].peak_bytes


def test_early_rejection_by_hand():
    """A beam search over a toy's steps, whose two halves the toy writes as two steps."""
    toy = Toy(6)
    search = bw.EarlyRejection(6, falling, lambda text: False, beam_width=3, tau=1, step_tokens=2)
    found = search.search(toy, 0)
    beams = [(i,) for i in range(6)]
    while True:
        order = sorted(range(len(beams)), key=lambda i: -falling(None, [torch.tensor(beams[i])])[0])[:2]
        kept = [(*beams[i], i if len(beams[i]) == 1 else beams[i][-1]) for i in order]  # a fork keeps its number
        if len(kept[0]) == 6:
            break
        beams = [(*text, i) for text in kept for i in range(3)]
    kept.sort(key=lambda text: -falling(None, [torch.tensor(text)])[0])
    equal(found.texts, [torch.tensor(text) for text in kept])
    assert toy.written == [(6, 6, 1), (2, 2, 1)] * 3
    assert [len(step["kept"]) for step in found.trace] == [2, 2, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: bw.ParticleFilter(4, partial_reward, lambda text: len(text) >= 5, answer=lambda t: int(t[-1]), **o),
        lambda **o: bw.AStar(4, partial_reward, lambda text: len(text) >= 5, **o),
        lambda **o: bw.EarlyRejection(4, partial_reward, lambda text: len(text) >= 8, beam_width=2, tau=3, **o),
    ],
    ids=["particles", "a_star", "rejection"],
)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_guided_searches_on_a_model(make, drafter):
    """Whole texts, the same for a seed whatever the batch, and what speculation does not change."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(3, 4)
    search = make(seed=2, drafter=drafter)
    out = model.generate(ids, attention_mask=mask, custom_generate=search, **SAMPLING)
    plain_search = make(seed=2)
    for b in range(3):
        start = ids.shape[1] - int(mask[b].sum())
        alone = model.generate(ids[b : b + 1, start:], custom_generate=plain_search, **SAMPLING)
        text = plain_search.found[0].texts[0]
        # The longest text is bounded by the padded prompt's length, as in plain generate.
        assert out[b, ids.shape[1] :][: len(text)].tolist()[:24] == text.tolist()[:24]
        assert alone.shape[1] - (ids.shape[1] - start) == len(text)
        assert search.found[b].trace == plain_search.found[0].trace
        assert 1 <= len(text) <= 24 and (len(text) == 24 or text[-1] == 2)


def test_equal_prompts_draw_apart():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 2)
    particles = bw.ParticleFilter(3, partial_reward, lambda text: len(text) >= 5, seed=2)
    for search in (bw.BestOfN(3, by_sum, seed=2), particles):
        model.generate(ids.expand(3, -1), attention_mask=mask.expand(3, -1), custom_generate=search, **SAMPLING)
        texts = [tuple(text.tolist()) for found in search.found for text in found.texts]
        assert len(set(texts)) > 6
    model.generate(ids, attention_mask=mask, custom_generate=particles, **SAMPLING)
    assert tuple(particles.found[0].texts[0].tolist()) == texts[0]  # the first is what it is alone


def test_cancelling_returns_what_there_is():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 6)

    class AfterFive(bw.Monitor):
        rounds = 0

        def advance(self, tokens):
            super().advance(tokens)
            self.rounds += 1
            if self.rounds == 5:
                threading.Thread(target=self.cancel).start()
                while not self.cancelled:
                    pass

    monitor = AfterFive(progress=False)
    search = bw.BestOfN(3, by_sum, seed=0, monitor=monitor)
    out = model.generate(ids, attention_mask=mask, custom_generate=search, **{**SAMPLING, "eos_token_id": None})
    assert out.shape[1] == ids.shape[1] + 5 and monitor.tokens == 15
    whole = plain(model, ids, mask, 3, 0, eos_token_id=None)[0]
    assert sorted(t.tolist() for t in search.found[0].texts) == sorted(t[:5].tolist() for t in whole)
    # The next run is not concerned.
    monitor.rounds = 6
    model.generate(ids, attention_mask=mask, custom_generate=search, **SAMPLING)
    assert len(search.found[0].texts[0]) > 5


def test_an_interrupt_leaves_the_branches_usable():
    """Broken off inside a forward, or by a reward: the text so far is whole, and writing on gives the same text."""
    model = tiny.model("llama")
    prompt = torch.randint(3, 100, (30,), generator=torch.Generator().manual_seed(0))

    def write(interrupted_at):
        branches, root = grove(model, prompt, 25)
        rows = branches.fork(root, 3)
        calls = 0

        def hook(*args):
            nonlocal calls
            calls += 1
            if calls == interrupted_at:
                raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_hook(hook)
        try:
            branches.write(rows, 3)
        except KeyboardInterrupt:
            assert branches.tree.rows == [] and branches.tree.pool.branches == sorted([root, *rows])
        finally:
            handle.remove()
        branches.write(rows, 3)
        return [branches.said(row) for row in rows]

    with torch.no_grad(), use_attention(model):
        whole = write(0)
        for at in (1, 2, 7):
            equal(write(at), whole)


class Letters:
    """A tokenizer whose tokens are strings."""

    names = ("a", "b", "\n", "\n\n", ".\n\n", "c\n")

    def decode(self, ids):
        return "".join(self.names[i] for i in ids)


@pytest.mark.parametrize(
    "tokens, ends", [([0, 3], True), ([0, 2, 2], True), ([1, 4], True), ([5, 2], True), ([2, 0, 2], False), ([3], True)]
)
def test_step_end(tokens, ends):
    end = bw.StepEnd(Letters())
    assert end(torch.tensor(tokens)) is ends
    assert not any(end(torch.tensor(tokens[:n])) for n in range(1, len(tokens)))


class Silent:
    def put(self, tokens):
        pass

    end = put


def one_prompt_call(make, **options):
    model = tiny.model("llama")
    return model.generate(torch.tensor([[5, 6, 7]]), custom_generate=make(), **{**SAMPLING, **options})


@pytest.mark.parametrize(
    "message, call",
    [
        ("width must be at least 1, got 0", lambda: bw.BestOfN(0, by_sum)),
        ("m must lie between 1 and k = 3, got 4", lambda: bw.ShortMAtK(4, 3, last_of_four)),
        (r"frequency must lie in \[0, 1\], got 2", lambda: bw.BestOfMajority(3, by_sum, frequency=2)),
        ("k must be at least 1, got 0", lambda: bw.BestOfMajority(3, by_sum, k=0)),
        ("temperature must be positive", lambda: bw.ParticleFilter(3, by_sum, last_of_four, temperature=0)),
        ("finished must be", lambda: bw.ParticleFilter(3, by_sum, last_of_four, finished="x")),
        ("max_expansions must be at least 1", lambda: bw.AStar(3, by_sum, last_of_four, max_expansions=0)),
        ("resident must be at least 0", lambda: bw.AStar(3, by_sum, last_of_four, resident=-1)),
        ("beam_width must divide n = 4, got 3", lambda: bw.EarlyRejection(4, by_sum, last_of_four, beam_width=3)),
        ("tau must lie between 1 and step_tokens", lambda: bw.EarlyRejection(4, by_sum, last_of_four, tau=999)),
        ("string must not be empty", lambda: bw.StepEnd(Letters(), "")),
        ("do_sample must be True", lambda: one_prompt_call(lambda: bw.BestOfN(2, by_sum), do_sample=False)),
        ("one number per text, 2, got 1", lambda: one_prompt_call(lambda: bw.BestOfN(2, lambda p, t: [1.0]))),
        ("must give numbers", lambda: one_prompt_call(lambda: bw.BestOfN(1, lambda p, t: [float("nan")]))),
        (
            r"reward must lie in \[0, 1\] for AStar",
            lambda: one_prompt_call(lambda: bw.AStar(2, lambda p, t: [2.0, 0.0], last_of_four)),
        ),
        (
            "streamer is not supported by BestOfN",
            lambda: one_prompt_call(lambda: bw.BestOfN(2, by_sum), streamer=Silent()),
        ),
        (
            "return_dict_in_generate=True is not supported by BestOfN",
            lambda: one_prompt_call(lambda: bw.BestOfN(2, by_sum), return_dict_in_generate=True),
        ),
    ],
)
def test_refusals(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kv_policy_is_refused():
    match = "is under a KV policy; a search keeps a KV tree of its own"
    with bw.sparse_kv(tiny.model("llama"), bw.kv.StreamingLLM()), pytest.raises(ValueError, match=match):
        one_prompt_call(lambda: bw.BestOfN(2, by_sum))
