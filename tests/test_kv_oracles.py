"""What KV policies keep and attend to, against their definitions over dense attention matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import branchwise as bw
import tiny
from branchwise import kv
from branchwise.attention import LayerCall
from branchwise.cache import CACHE_NAME
from branchwise.kv.adakv import head_budgets
from branchwise.kv.delta import page_masses
from branchwise.kv.pyramidkv import layer_budget
from branchwise.kv.quest import QuestSession
from branchwise.kv.specpc import choose_tokens


@pytest.fixture
def model():
    return tiny.model("llama")


def prompt(n=70, seed=0):
    return torch.randint(3, 120, (1, n), generator=torch.Generator().manual_seed(seed))


def attentions(model, ids):
    """Probabilities [Hq, n, n] and keys [Hkv, n, D] of every layer, of the model itself."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(ids, output_attentions=True, use_cache=True)
    finally:
        model.set_attn_implementation(implementation)
    keys = [layer.keys[0] for layer in out[CACHE_NAME].layers]
    return [a[0] for a in out.attentions], keys


def decode(model, policy, ids, new=1):
    with bw.sparse_kv(model, policy):
        out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    return out.sequences[0], out[CACHE_NAME]


def kept_slots(layer, head, keys, last=None):
    """Which positions a head of a paged layer holds, found by their keys; of its first ``last`` slots."""
    held = layer.row(0, head)[0][:last]
    distance = torch.cdist(held, keys[head], compute_mode="donot_use_mm_for_euclid_dist")
    assert (distance.amin(1) < 1e-4).all()
    return distance.argmin(1).tolist()


def best(scores, count):
    """Ascending indices of the best, ties to the lower one."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count])


@pytest.mark.parametrize("pooling, kernel", [("avg", 5), ("max", 7), ("avg", 1)])
def test_snapkv(model, pooling, kernel):
    ids, W, budget = prompt(), 8, 30
    _, store = decode(model, kv.SnapKV(budget, W, kernel, pooling), ids)
    function = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    for layer, probabilities, keys in zip(store.layers, *attentions(model, ids), strict=True):
        scores = probabilities[:, -W:, :-W].sum(1).view(2, 2, -1).mean(1)
        scores = function(scores[None], kernel, stride=1, padding=kernel // 2)[0]
        for head in range(2):
            expected = [*best(scores[head], budget - W), *range(70 - W, 70)]
            assert kept_slots(layer, head, keys) == expected


def test_h2o_at_every_step(model):
    """Sums after each token, and what is kept, against a simulation over the cache that is left."""
    ids, budget, recent, new = prompt(40), 24, 10, 30
    text, store = decode(model, kv.H2O(budget, recent, interval=1), ids, new)
    matrices, keys = attentions(model, text[None, :-1])
    # The first layer's keys and queries do not depend on what was evicted.
    logits = (matrices[0].double() + 1e-300).log()  # up to a constant per row
    for head in range(2):
        held, sums = list(range(40)), matrices[0][2 * head : 2 * head + 2, :40, :40].double().sum((0, 1)).tolist()
        for step in range(new):
            if len(held) > budget:
                old = len(held) - recent
                chosen = [*best(sums[:old], budget - recent), *range(old, len(held))]
                held, sums = [held[i] for i in chosen], [sums[i] for i in chosen]
            position = 40 + step
            if position == len(text) - 1:
                break
            held.append(position)
            sums.append(0.0)
            for q in (2 * head, 2 * head + 1):
                row = torch.softmax(logits[q, position, held], -1)
                sums = [s + float(p) for s, p in zip(sums, row, strict=True)]
        assert kept_slots(store.layers[0], head, keys[0]) == held


def test_h2o_sums_of_the_prompt_are_column_sums(model):
    ids = prompt(50)
    sessions = []

    class Watching(kv.H2O):
        def begin(self, model, store):
            sessions.append(super().begin(model, store))
            return sessions[0]

    decode(model, Watching(100), ids)
    for layer, matrix in enumerate(attentions(model, ids)[0]):
        sums = sessions[0].sums[layer][0, :, :50]
        torch.testing.assert_close(sums, matrix.view(2, 2, 50, 50).sum((1, 2)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sums.sum(-1), torch.full((2,), 100.0), atol=1e-3, rtol=0)


def test_tova(model):
    ids = prompt()
    _, store = decode(model, kv.TOVA(25), ids)
    for layer, probabilities, keys in zip(store.layers, *attentions(model, ids), strict=True):
        expected = best(probabilities[:, -1].mean(0), 25)
        assert kept_slots(layer, 0, keys) == kept_slots(layer, 1, keys) == expected


def test_recent_only_h2o_is_streaming_without_sinks(model):
    ids = prompt()
    h2o, _ = decode(model, kv.H2O(30, recent=30, interval=4), ids, 40)
    streaming, _ = decode(model, kv.StreamingLLM(0, 30, interval=4), ids, 40)
    assert torch.equal(h2o, streaming)


def test_streaming_heads_only_is_streaming_in_place(model):
    """Each token sees sinks and window, as when evicting after every token with a window of one less."""
    ids = prompt()
    heads, _ = decode(model, kv.HeadwiseKV(torch.zeros(3, 2), 1.0, 4, 31, page_size=4), ids, 40)
    streaming, _ = decode(model, kv.StreamingLLM(4, 30, renumber=False, interval=1), ids, 40)
    assert torch.equal(heads, streaming)


def test_streaming_llm_attends_as_if_positions_were_those_in_the_cache(model):
    """The keys it holds are the first layer's own, turned to positions 0 .. n - 1 plus one shift for all."""
    ids, sinks, recent = prompt(90), 4, 20
    text, store = decode(model, kv.StreamingLLM(sinks, recent, interval=1), ids, 30)
    n = sinks + recent
    kept = [*range(sinks), *range(len(text) - 1 - recent, len(text) - 1)]
    block = model.model.layers[0]
    with torch.no_grad():
        hidden = block.input_layernorm(model.model.embed_tokens(text[None, kept]))
        plain = block.self_attn.k_proj(hidden).view(1, n, 2, -1).transpose(1, 2)
        shift = len(text) - 1 - n
        cos, sin = model.model.rotary_emb(hidden, torch.arange(n)[None] + shift)
    half = plain.shape[-1] // 2
    turned = plain * cos[:, None] + torch.cat([-plain[..., half:], plain[..., :half]], -1) * sin[:, None]
    for head in range(2):
        held = store.layers[0].row(0, head)[0]
        torch.testing.assert_close(held[-n:], turned[0, head], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "layers, base, length, beta", [(30, 100, 2000, 20), (8, 96, 210, 20), (3, 64, 5000, 1), (1, 9, 99, 2)]
)
def test_pyramid_budgets(layers, base, length, beta):
    budgets = [layer_budget(base, length, layer, layers, beta) for layer in range(layers)]
    assert budgets == sorted(budgets, reverse=True) and max(budgets) <= length
    assert 0 <= sum(budgets) - layers * base < max(1, layers * (layers - 1) / 2)
    if beta == 1:
        assert set(budgets) == {base}
    assert layer_budget(base, 2 * base - 1, 0, layers, beta) == base


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
def test_ada_budgets(safeguard):
    scores = torch.rand(5, 200, generator=torch.Generator().manual_seed(0)) ** torch.tensor([[1.0], [2], [4], [8], [1]])
    budgets = head_budgets(scores, 40, safeguard)
    assert int(budgets.sum()) == 200 and int(budgets.max()) <= 200
    top = torch.topk(scores.flatten(), 200).indices // 200
    exact = [(1 - safeguard) * int((top == head).sum()) + safeguard * 40 for head in range(5)]
    assert all(abs(int(b) - e) < 1 for b, e in zip(budgets, exact, strict=True))


def test_ada_with_an_even_share_is_snapkv(model):
    ids = prompt()
    ada, _ = decode(model, kv.AdaKV(30, 8, safeguard=1.0), ids, 30)
    snap, _ = decode(model, kv.SnapKV(30, 8), ids, 30)
    pyramid, _ = decode(model, kv.PyramidKV(30, 8, beta=1), ids, 30)
    assert torch.equal(ada, snap) and torch.equal(pyramid, snap)


def test_speckv_without_an_answer_is_snapkv_with_maxima(model):
    """No answer: the window is the prompt's last tokens and one, whose own column is cut off again."""
    ids = prompt()
    _, store = decode(model, kv.SpecKV(model, 30, 0, 8, kernel=1), ids)
    for layer, probabilities, keys in zip(store.layers, *attentions(model, ids), strict=True):
        scores = probabilities[:, -9:, :-9].amax(1).view(2, 2, -1).amax(1)
        for head in range(2):
            # The last token was computed again, over the slots that were left.
            assert kept_slots(layer, head, keys, 30) == [*best(scores[head], 22), *range(61, 69)]


def test_speckv_generates_at_true_positions(model):
    """With room for the prompt, cropping the answer and recomputing the last token leaves plain decoding."""
    ids = prompt()
    plain = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)[0]
    session_budget = 69  # below the prompt's 70: the draft runs, and nearly everything stays
    text, store = decode(model, kv.SpecKV(model, session_budget, 8, 8), ids, 32)
    assert store.seq_lens.tolist() == [70 + 31] and len(text) == len(plain)


def test_gemfilter_is_the_plain_model_on_the_tokens_that_are_left(model):
    ids, sessions = prompt(), []

    class Watching(kv.GemFilter):
        def begin(self, model, store):
            sessions.append(super().begin(model, store))
            return sessions[-1]

    text, _ = decode(model, Watching(30, 1), ids, 20)
    kept = sessions[0].kept[0]
    plain = model.generate(ids[:, kept], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(plain[0, 30:], text[70:])
    projections = kv.projections.LayerProjections(model, 1)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[1]
        q, k = (projections.rotate(x, torch.arange(70)[None]) for x in projections(projections.norm(states)))
    scores = (q[0, :, -1:] @ k[0].repeat_interleave(2, 0).mT).sum(0)
    assert kept.tolist() == best(F.avg_pool1d(scores[None], 5, stride=1, padding=2)[0, 0], 30)


def test_prompt_distill_by_hand(model):
    """Layer by layer with the model's own modules."""
    ids, layer, budget = prompt(), 1, 25
    inner = model.model
    with torch.no_grad():
        hidden, positions = inner.embed_tokens(ids), torch.arange(70)[None]
        for index, block in enumerate(inner.layers):
            angles = inner.rotary_emb(hidden, positions)
            if index == layer:
                attention = block.self_attn
                states = block.input_layernorm(hidden)
                q, k = (p(states).view(1, 70, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
                q, k = (x * angles[0] + torch.cat([-x[..., 4:], x[..., :4]], -1) * angles[1] for x in (q, k))
                scores = (q[0, :, -1:] @ k[0].repeat_interleave(2, 0).mT).mean(0)[0]
            n = hidden.shape[1]
            mask = torch.full((n, n), -math.inf).triu(1)[None, None]
            hidden = block(hidden, attention_mask=mask, position_embeddings=angles, position_ids=positions)
            if index == layer:
                kept = [*best(scores[:69], budget), 69]
                hidden, positions = hidden[:, kept], positions[:, kept]
        logits = model.lm_head(inner.norm(hidden[:, -1:]))
    text, store = decode(model, kv.PromptDistill([budget], [layer], page_size=4), ids)
    assert int(logits.argmax()) == int(text[-1])
    assert store.layers[2].lens.tolist() == [[26, 26]] and store.layers[1].lens.tolist() == [70]
    _, store = decode(model, kv.PromptDistill([budget], [layer], truncate=1, page_size=4), ids)
    assert [layer.lens.tolist() for layer in store.layers] == [[[26, 26]]] * 3
    assert store.num_bytes <= 6 * 2 * 8 * 4 * (26 + 4)


def choose_by_hand(scores, budget, window, kernel, neighbours):
    n = len(scores)
    pooled = []
    for i in range(n):
        low = i - (kernel - 1) // 2
        pooled.append(max([float(scores[j]) for j in range(low, low + kernel) if 0 <= j < n] + [0.0]))
    order = sorted(range(n), key=lambda i: (-pooled[i], i))[:budget]
    steps = sorted(range(-((neighbours - 1) // 2), neighbours // 2 + 1), key=lambda d: (abs(d), d))
    chosen = list(range(max(0, n - window), n))
    for i in order:
        for step in steps:
            j = min(max(i + step, 0), n - 1)
            if j not in chosen:
                chosen.append(j)
    return sorted(chosen[: min(budget, n)])


@pytest.mark.parametrize(
    "n, budget, window, kernel, neighbours", [(100, 40, 8, 8, 8), (30, 40, 8, 4, 4), (200, 50, 16, 1, 3)]
)
def test_specpc_choice(n, budget, window, kernel, neighbours):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(n))
    chosen = choose_tokens(scores, budget, window, kernel, neighbours)
    assert chosen.tolist() == choose_by_hand(scores, budget, window, kernel, neighbours)
    assert len(chosen) == min(budget, n) and set(range(max(0, n - window), n)) <= set(chosen.tolist())


def test_specpc_scores_are_the_drafts_attention(model):
    ids, sessions = prompt(), []

    class Watching(kv.SpecPC):
        def begin(self, model, store):
            sessions.append(super().begin(model, store))
            return sessions[-1]

    policy = Watching(model, 40, 8, lookahead=0, kernel=1, first_layer=1)
    decode(model, policy, ids)
    scores = sessions[0]._scores([ids[0]], [torch.empty(0, dtype=torch.int64)])[0, :70]
    weights = torch.linspace(0, 1, 8)
    expected = torch.stack([(m[:, -8:] * weights[:, None]).amax((0, 1)) for m in attentions(model, ids)[0][1:]]).amax(0)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


class Recording:
    """What a session's layers were asked and what they attended to."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple[LayerCall, torch.Tensor, torch.Tensor, dict]] = []
        sparse = LayerCall.sparse

        def recorded(call, indices, counts, **options):
            self.calls.append((call, indices, counts, options))
            return sparse(call, indices, counts, **options)

        monkeypatch.setattr(LayerCall, "sparse", recorded)


def test_quest_chooses_pages_by_their_bounds(model, monkeypatch):
    recording, size = Recording(monkeypatch), 8
    decode(model, kv.Quest(48, size, dense_layers=1, recent=8, sinks=8, min_length=0), prompt(100), 20)
    assert len(recording.calls) == 2 * 19
    for call, indices, counts, _ in recording.calls:
        P = int(call.lens[0])
        competing = P // size - 1
        for head in range(2):
            keys = call.keys[0, head, : competing * size].view(competing, size, -1)
            q = call.query[0, 2 * head : 2 * head + 2, 0]
            bounds = torch.maximum(q[:, None] * keys.amax(1), q[:, None] * keys.amin(1)).sum(-1).amax(0)
            bounds[0] = math.inf  # the sinks' page
            expected = best(bounds, 48 // size - 2) + list(range(competing, -(-P // size)))
            assert indices[0, 0, head, : int(counts[0, 0, head])].tolist() == expected


def test_delta_plans_pages_by_the_planners_attention(model, monkeypatch):
    recording, size = Recording(monkeypatch), 8
    planned = []
    masses = kv.delta.page_masses

    def watched(call, lse, page_size):
        planned.append(call)
        return masses(call, lse, page_size)

    monkeypatch.setattr(kv.delta, "page_masses", watched)
    decode(model, kv.DELTA(48, [1], warm_up=1, page_size=size, recent=8, min_length=0), prompt(100), 20)
    assert len(recording.calls) == len(planned) == 19
    for plan, (call, indices, counts, _) in zip(planned, recording.calls, strict=True):
        assert (plan.layer, call.layer) == (1, 2)
        P = int(plan.lens[0])
        keys = plan.keys[0, :, : P + 1].repeat_interleave(2, 0)
        probabilities = (plan.query[0, :, 0, None] @ keys.mT * plan.scale).softmax(-1)[:, 0]
        tokens = probabilities.amax(0)
        competing = P // size - 1
        pages = tokens[: competing * size].view(competing, size).sum(-1)
        expected = best(pages, 48 // size - 2) + list(range(competing, -(-P // size)))
        assert indices[0, 0, 0, : int(counts[0, 0, 0])].tolist() == expected and indices.shape[2] == 1


def test_page_masses_add_up(model):
    """Between one (one head) and the number of heads."""
    seen = []

    class Watching(kv.KVSession):
        def attend(self, call):
            out, lse = call.dense()
            seen.append(page_masses(call, lse, 16)[..., : -(-70 // 16)].sum(-1))
            return out

    class Policy:
        def begin(self, model, store):
            return Watching(model, store)

    decode(model, Policy(), prompt())
    for sums in seen[:3]:
        assert (sums >= 1 - 1e-4).all() and (sums <= 4 + 1e-4).all()


def test_planners_are_placed_where_attention_changes(model):
    planners = kv.place_planners(model, prompt(50)[0], count=2, first=0)
    last = torch.stack([m[:, -1].amax(0) for m in attentions(model, prompt(50))[0]])
    change = 1 - torch.cosine_similarity(last[1:], last[:-1], dim=-1)
    assert planners == [0, 1 + int(change.argmax())]
    with pytest.raises(ValueError, match="at least two token ids"):
        kv.place_planners(model, prompt(1)[0])


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
def test_quest_summaries_cover_what_is_committed(dtype, model):
    """After a speculated text, a layer's summaries equal those of its keys."""
    sessions = []

    class Watching(kv.Quest):
        def begin(self, model, store):
            sessions.append(QuestSession(model, store, self))
            return sessions[0]

    ids = prompt(100)
    policy = Watching(64, 8, dense_layers=0, recent=16, min_length=0, summary_dtype=dtype)
    with bw.sparse_kv(model, policy):
        decoder = bw.TreeSpeculation("suffix", adaptive=False)
        model.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=None, custom_generate=decoder)
    session = sessions[0]
    for layer in range(3):
        pages = int(session._summarised[layer][0])
        assert (100 + 40) // 8 <= pages <= int(session.store.seq_lens[0]) // 8
        keys = session.store.layers[layer].keys[0, :, : pages * 8].unflatten(1, (-1, 8))
        expected = torch.cat([keys.amax(2), keys.amin(2)], -1).to(dtype)
        assert torch.equal(session._summaries[layer][0, :, :pages].float(), expected.float())
        assert session.num_bytes == 3 * 2 * keys.shape[-1] * keys.shape[0] * session._summaries[layer].shape[2] * (
            keys.element_size() if dtype is None else 1
        )


def test_break_even_is_measured_once():
    from branchwise.kv.selecting import break_even

    first = break_even(4, 2, 32, torch.float32, 16, 64)
    assert first % 64 == 0 or first == 2**31 - 1
    assert break_even(4, 2, 32, torch.float32, 16, 64) == first and break_even.cache_info().hits >= 1


# SentenceKV


def test_sentences_are_cut_behind_marks(model):
    session = kv.SentenceKV([9], 100, longest=5).begin(model, bw.KVStore(1))
    for tokens, cuts in (
        ([1, 2, 9, 3, 4], [0, 3, 5]),
        ([9, 1, 9], [0, 1, 3]),
        ([9, 9], [0, 1, 2]),
        ([1, 2], [0, 2]),
        ([1] * 12, [0, 5, 10, 12]),
    ):
        assert session._cut(torch.tensor(tokens).numpy()) == cuts


def test_sentence_marks():
    class Tokenizer:
        texts = ("a", ".", "b!", 'c."', " 。", "d\n\n", "e,", ".5", "Mr. ")

        def __len__(self):
            return len(self.texts)

        def decode(self, ids):
            return self.texts[ids[0]]

    assert kv.sentence_marks(Tokenizer()) == {1, 2, 3, 4, 5, 8}


def test_sentencekv_selects_by_hand(model, monkeypatch):
    """Every list against a simulation with whole sentences, and the mean keys of what the prompt kept."""
    recording, marks = Recording(monkeypatch), set(range(40, 60))
    options = {"sinks": 4, "recent": 12, "window": 8}
    sessions = []

    class Watching(kv.SentenceKV):
        def begin(self, model, store):
            sessions.append(super().begin(model, store))
            return sessions[0]

    text, store = decode(model, Watching(marks, 32, 1.5, **options), prompt(90), 40)
    text = text.tolist()
    assert len(recording.calls) == 3 * 39
    for call, indices, counts, _ in recording.calls:
        P = int(call.plan.positions[0, 0])
        begins = [i + 1 for i in range(90, P) if text[i] in marks]
        opened = max(begins, default=90)
        n = int(call.lens[0, 0])
        chosen = indices[0, 0, 0, : int(counts[0, 0, 0])].tolist()
        if text[P] in marks or opened == P:  # everything that is held
            assert chosen == list(range(n))
            continue
        sentence, recent = set(range(n - (P - opened), n)), set(range(n - 11, n))
        assert sentence | recent | set(range(4)) <= set(chosen)
        others = set(chosen) - sentence - recent - set(range(4))
        taken = min(32 - 12 - 4, n - 4 - len(sentence | recent))
        assert len(others) == taken
    cuts = sessions[0].cuts[0]
    assert [i + 1 for i, token in enumerate(text[:-1]) if token in marks and i >= 90] == cuts[
        -(len(begins)) :
    ] or not begins
    for layer in range(3):
        held = store.layers[layer]
        offsets = sessions[0]._offsets[layer][0, 0].tolist()
        assert offsets == sorted(offsets) and offsets[-1] <= int(held.lens[0, 0])
        means = sessions[0]._means.get(layer)
        for i in range(len(offsets) - 1):
            if means is not None and offsets[i + 1] > offsets[i]:
                keys = held.row(0, 0)[0][offsets[i] : offsets[i + 1]]
                torch.testing.assert_close(means[0, 0, i], keys.mean(0), atol=1e-5, rtol=1e-4)


# SpeContext and gates


def test_specontext_uses_one_list_for_all_layers(model, monkeypatch):
    recording = Recording(monkeypatch)
    head = kv.LayerHead(model)
    text, _ = decode(model, kv.SpeContext(head, 40, sinks=4, recent=12, min_length=0), prompt(90), 12)
    for step in range(11):
        lists = [
            indices[0, 0, :, : int(counts.max())] for _, indices, counts, _ in recording.calls[3 * step : 3 * step + 3]
        ]
        assert torch.equal(lists[0], lists[1]) and torch.equal(lists[0], lists[2])
        P = 90 + step
        with torch.no_grad():
            query, key = head(text[None, : P + 1], torch.arange(P + 1)[None])
        logits = query[0, :, -1:] @ key[0, :, : P - 12].repeat_interleave(2, 0).mT / math.sqrt(8)
        weights = logits.softmax(-1)[:, 0].view(2, 2, -1).amax(1)
        weights[:, :4] = math.inf
        for group in range(2):
            assert lists[0][group].tolist() == best(weights[group], 27) + list(range(P - 12, P))


def test_retrieval_heads_queries_and_keys_are_the_layers(model):
    """On what the layer really sees, projections and rotation give the layer's own keys."""
    ids = prompt(20)
    projections = kv.projections.LayerProjections(model, 0)
    with torch.no_grad():
        _, key = projections(projections.norm(model.model.embed_tokens(ids)))
        key = projections.rotate(key, torch.arange(20)[None])
    torch.testing.assert_close(key[0], attentions(model, ids)[1][0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has no q_proj, k_proj, input_layernorm and rotary_emb"):
        kv.LayerHead(tiny.model("gpt_neox"))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gates_say_how_far_back_a_head_looks(name):
    model = tiny.model(name)
    gates = kv.estimate_gates(model, prompt(60)[0], positions=100)
    assert gates.shape == (3, 2) and (gates > 0).all() and (gates < 1).all()
    with pytest.raises(ValueError, match="must not be empty"):
        kv.estimate_gates(model, torch.empty(0, dtype=torch.int64))


def test_headwise_frees_the_smallest_gates():
    gates = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.2, 1.0]])
    assert kv.HeadwiseKV(gates, 1 / 3).full_heads().tolist() == [[False, True], [True, True], [False, True]]
    assert kv.HeadwiseKV(gates, 0.5).full_heads().sum() == 3  # ties are broken by a seeded coin
    assert torch.equal(kv.HeadwiseKV(gates, 0.5).full_heads(), kv.HeadwiseKV(gates, 0.5).full_heads())
    assert kv.HeadwiseKV(gates, 0.0).full_heads().all() and not kv.HeadwiseKV(gates, 1.0).full_heads().any()
