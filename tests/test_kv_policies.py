"""Every KV policy: same text with and without speculation, alone and in a batch; exact where it says so; bytes."""

from __future__ import annotations

import pytest
import torch

import branchwise as bw
import tiny
from branchwise import kv
from branchwise.cache import CACHE_NAME

NEW = 40


class HalfPress:
    """What a kvpress press looks like from outside."""

    compression_ratio = 0.5

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert hidden_states.shape[1] == keys.shape[2] == kwargs["position_embeddings"][0].shape[1]
        return -keys.norm(dim=-1)


class EverythingPress(HalfPress):
    compression_ratio = 0.0


def draft(name):
    return tiny.model(name)


# (what saves something on prompts of 60 to 90 tokens, what keeps everything)
POLICIES = {
    "streaming": lambda m: (kv.StreamingLLM(4, 30, interval=8), kv.StreamingLLM(4, 200)),
    "streaming_in_place": lambda m: (kv.StreamingLLM(4, 30, renumber=False, interval=8), kv.StreamingLLM(0, 200)),
    "h2o": lambda m: (kv.H2O(32, interval=8), kv.H2O(200)),
    "h2o_ratio": lambda m: (kv.H2O(0.5, recent=4, interval=4), kv.H2O(200, recent=1)),
    "tova": lambda m: (kv.TOVA(32, interval=8), kv.TOVA(200)),
    "snapkv": lambda m: (kv.SnapKV(40, 8), kv.SnapKV(200, 8)),
    "snapkv_max": lambda m: (kv.SnapKV(0.4, 8, kernel=7, pooling="max"), kv.SnapKV(1.0, 8)),
    "pyramidkv": lambda m: (kv.PyramidKV(40, 8, beta=4), kv.PyramidKV(200, 8)),
    "adakv": lambda m: (kv.AdaKV(40, 8), kv.AdaKV(200, 8)),
    "press": lambda m: (kv.FromPress(HalfPress()), kv.FromPress(EverythingPress())),
    "headwise": lambda m: (
        kv.HeadwiseKV(torch.rand(3, 2), 0.5, 4, 20, page_size=4),
        kv.HeadwiseKV(torch.rand(3, 2), 0.0),
    ),
    "gemfilter": lambda m: (kv.GemFilter(40, 1), kv.GemFilter(100, 1)),
    "prompt_distill": lambda m: (kv.PromptDistill([40], [1]), kv.PromptDistill([100], [1])),
    "prompt_distill_stages": lambda m: (
        kv.PromptDistill([40, 20], [0, 1], -1),
        kv.PromptDistill([100, 100], [0, 1], -1),
    ),
    "speckv": lambda m: (kv.SpecKV(m, 40, 8, 8), kv.SpecKV(m, 100, 8, 8)),
    "specpc": lambda m: (kv.SpecPC(m, 40, 8, kernel=8), kv.SpecPC(m, 100)),
    "sentencekv": lambda m: (
        kv.SentenceKV(range(40, 60), 32, 1.5, sinks=4, recent=12, window=8),
        kv.SentenceKV(range(40, 60), 200, sinks=4, recent=12, window=8),
    ),
    "specontext": lambda m: (
        kv.SpeContext(budget=40, recent=12, min_length=0),
        kv.SpeContext(budget=200, min_length=0),
    ),
    "quest": lambda m: (
        kv.Quest(64, page_size=8, recent=16, min_length=0, dense_layers=0),
        kv.Quest(256, page_size=8, recent=16, min_length=0),
    ),
    "quest_e4m3": lambda m: (
        kv.Quest(64, page_size=8, recent=16, min_length=0, dense_layers=0, summary_dtype=torch.float8_e4m3fn),
        kv.Quest(256, page_size=8, recent=16, min_length=0, summary_dtype=torch.float8_e4m3fn),
    ),
    "delta": lambda m: (
        kv.DELTA(64, [1], warm_up=1, page_size=8, recent=16, min_length=0),
        kv.DELTA(256, [1], warm_up=1, page_size=8, recent=16, min_length=0),
    ),
}


def batch():
    """Three left-padded prompts of 90, 60 and 75 tokens."""
    ids = torch.randint(3, 120, (3, 90), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(90) >= torch.tensor([[0], [30], [15]])).long()
    return torch.where(mask.bool(), ids, 0), mask


def run(model, policy, ids, mask, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    if policy is None:
        return model.generate(ids, attention_mask=mask, **options)
    with bw.sparse_kv(model, policy):
        return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("name", POLICIES)
def test_speculation_and_batches_give_the_sparse_models_text(name):
    model = tiny.model("llama")
    policy = POLICIES[name](model)[0]
    ids, mask = batch()
    plain = run(model, policy, ids, mask)
    assert not torch.equal(plain, run(model, None, ids, mask)), "the policy changes nothing here: a weak test"
    speculated = run(model, policy, ids, mask, custom_generate=bw.TreeSpeculation("trie", adaptive=False))
    assert torch.equal(plain, speculated)
    for row in range(3):
        own = mask[row].bool()
        alone = run(model, policy, ids[row : row + 1, own], mask[row : row + 1, own])
        assert torch.equal(alone[0, -NEW:], plain[row, -NEW:])


@pytest.mark.parametrize("name", POLICIES)
def test_prompts_may_be_read_in_chunks(name, monkeypatch):
    """Chunks of 20 tokens: rows end in different ones, and windows of queries reach over them."""
    model = tiny.model("llama")
    policy = POLICIES[name](model)[0]
    ids, mask = batch()
    whole = run(model, policy, ids, mask)
    monkeypatch.setattr("branchwise.forward._CHUNK", 20)
    assert torch.equal(run(model, policy, ids, mask), whole)


@pytest.mark.parametrize("name", POLICIES)
def test_exact_where_everything_fits(name):
    model = tiny.model("llama")
    ids, mask = batch()
    assert torch.equal(run(model, POLICIES[name](model)[1], ids, mask), run(model, None, ids, mask))


# Windows, sinks and soft caps of the model itself beside the policy; partial rotary embeddings; many experts.
@pytest.mark.parametrize(
    "architecture", ["qwen3", "gemma2", "gemma3", "gpt_neox", "gpt_oss", "qwen3_moe", "mistral", "phi3"]
)
@pytest.mark.parametrize(
    "name", ["streaming", "h2o", "adakv", "headwise", "gemfilter", "prompt_distill", "quest", "delta"]
)
def test_architectures(name, architecture):
    model = tiny.model(architecture)
    policy, exact = POLICIES[name](model)
    if name == "headwise" and architecture == "gpt_neox":
        policy, exact = kv.HeadwiseKV(torch.rand(3, 4), 0.5, 4, 20, page_size=4), kv.HeadwiseKV(torch.rand(3, 4), 0.0)
    ids, mask = batch()
    if name == "prompt_distill" and architecture in ("gemma2", "gemma3", "gpt_oss", "mistral"):
        with pytest.raises(ValueError, match="layers with a window of positions behind layer 1"):
            run(model, policy, ids, mask)
        return
    plain = run(model, policy, ids, mask)
    assert torch.equal(
        plain, run(model, policy, ids, mask, custom_generate=bw.TreeSpeculation("suffix", adaptive=False))
    )
    assert torch.equal(run(model, exact, ids, mask), run(model, None, ids, mask))


@pytest.mark.parametrize("name", ["h2o", "adakv", "headwise", "quest", "delta"])
def test_sampling_and_rows_that_end_early(name):
    model = tiny.model("llama")
    policy = POLICIES[name](model)[0]
    ids, mask = batch()
    options = {"do_sample": True, "temperature": 0.8, "eos_token_id": list(range(3, 9)), "max_new_tokens": 60}
    plain, tree = (
        run(model, policy, ids, mask, custom_generate=bw.TreeSpeculation(drafter, seed=3, adaptive=False), **options)
        for drafter in ("none", "trie")
    )
    assert torch.equal(plain, tree)
    ends = [int((row[90:] == 0).float().argmax()) for row in plain]
    assert len(set(ends)) > 1, "rows should end at different steps"


@pytest.mark.parametrize("name", POLICIES)
def test_other_dtypes(name):
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny.model("llama", dtype)
        out = run(model, POLICIES[name](model)[0], *batch())
        assert out.shape == (3, 90 + NEW)


def store_after(model, policy, ids, mask, new=1):
    options = {"return_dict_in_generate": True, "max_new_tokens": new}
    return run(model, policy, ids, mask, **options)[CACHE_NAME]


def formula(budgets_per_head, D=8, bytes_each=4):
    """Keys and values of so many slots."""
    return 2 * D * bytes_each * sum(budgets_per_head)


@pytest.mark.parametrize(
    "policy, kept",
    [
        (kv.SnapKV(40, 8, page_size=4), [40] * 6),
        (kv.TOVA(40, page_size=4), [40] * 6),
        (kv.H2O(40, page_size=4), [40] * 6),
        (kv.StreamingLLM(4, 36, page_size=4), [40] * 6),
        (kv.PyramidKV(40, 8, page_size=4, beta=4), [(8 + 56) * 2, (8 + 32) * 2, (8 + 8) * 2]),
        (kv.AdaKV(40, 8, page_size=4), [80] * 3),
        (kv.HeadwiseKV(torch.tensor([[0.0, 1], [1, 0], [1, 1]]), 1 / 3, 8, 16, page_size=4), [90 * 4, 24 * 2]),
        (kv.FromPress(HalfPress(), page_size=4), [45] * 6),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, list) else "",
)
def test_bytes_held_after_the_prompt(policy, kept):
    """At most the formula plus a page per head, as the pools' storage says."""
    model = tiny.model("llama")
    ids, mask = batch()
    store = store_after(model, policy, ids[:1], mask[:1])
    pools = [tensor for layer in store.layers for tensor in (layer.keys, layer.values)]
    held = sum(tensor.untyped_storage().nbytes() for tensor in pools)
    page = formula([4] * 6)
    assert store.num_bytes == held
    assert formula(kept) <= held <= formula(kept) + page
    assert all(layer.page_table is None or len(layer.keys) for layer in store.layers)


def test_memory_stays_bounded_while_decoding():
    model = tiny.model("llama")
    ids, mask = batch()
    for policy, most in (
        (kv.H2O(40, interval=8, page_size=4), 48),
        (kv.TOVA(40, interval=8, page_size=4), 48),
        (kv.StreamingLLM(4, 36, interval=8, page_size=4), 48),
        (kv.HeadwiseKV(torch.rand(3, 2), 1.0, 8, 32, page_size=4), 40),
    ):
        store = store_after(model, policy, ids[:1], mask[:1], new=200)
        for layer in store.layers:
            held = int((layer.page_table >= 0).sum()) * layer.page_size
            assert held <= 2 * (most + 2 * layer.page_size)
            # An eighth of slack, as pools grow.
            assert len(layer.keys) * layer.page_size <= 2 * (most + 3 * layer.page_size) * 1.25


def test_evicted_prompts_free_their_slots_layer_by_layer():
    """While the prompt's last layer attends, the layers below are evicted already."""
    model, held = tiny.model("llama"), []

    class Watching(kv.SnapKV):
        def begin(self, model, store):
            session = super().begin(model, store)
            attend = session.attend

            def watched(call):
                out = attend(call)
                held.append(store.num_bytes)
                return out

            session.attend = watched
            return session

    ids, mask = batch()
    store_after(model, Watching(40, 8, page_size=4), ids[:1], mask[:1])
    full = held[0] if len(held) == 1 else max(held)
    assert held[:3] == sorted(held[:3]) and held[2] == 3 * formula([40, 40])
    assert full < 3 * formula([90, 90])


def test_sinks_are_not_moved_under_angles_that_change_with_the_length():
    model = tiny.model("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    try:
        with pytest.raises(ValueError, match="pass renumber=False"):
            run(model, kv.StreamingLLM(4, 30), *batch())
    finally:
        model.model.rotary_emb.rope_type = "default"


def test_the_model_is_restored():
    model = tiny.model("llama")
    before = dict(model.__dict__)
    with pytest.raises(RuntimeError, match="stop"), bw.sparse_kv(model, kv.H2O(40)):
        assert kv.policy_of(model) is not None
        with pytest.raises(ValueError, match="under a KV policy already"):
            bw.patch(model, kv.TOVA(40))
        raise RuntimeError("stop")
    assert kv.policy_of(model) is None and model.__dict__.keys() == before.keys()
    bw.unpatch(model)
    bw.patch(model, kv.TOVA(40))
    bw.unpatch(model)
    assert "generate" not in model.__dict__


def test_the_store_of_an_early_exit_is_not_shared():
    model = tiny.model("llama")
    ids, mask = batch()
    with pytest.raises(ValueError, match="without a KV policy"):
        run(model, kv.H2O(40), ids, mask, custom_generate=bw.TreeSpeculation(bw.drafters.EarlyExit(1)))


def test_a_presss_hooks_are_removed_whatever_happens():
    model = tiny.model("llama")
    ids, mask = batch()
    with pytest.raises(ValueError, match="without a KV policy"):
        run(model, kv.FromPress(HalfPress()), ids, mask, custom_generate=bw.TreeSpeculation(bw.drafters.EarlyExit(1)))
    run(model, kv.FromPress(HalfPress()), ids, mask)
    assert not any(module._forward_pre_hooks for module in model.modules())


BAD = [
    (lambda m: kv.SnapKV(8, 8), "budget must be at least 9 tokens, got 8"),
    (lambda m: kv.SnapKV(1.5), r"budget must be a ratio in \(0, 1\]"),
    (lambda m: kv.SnapKV(40, kernel=4), "kernel must be odd"),
    (lambda m: kv.SnapKV(40, pooling="sum"), "pooling must be"),
    (lambda m: kv.PyramidKV(40, beta=0), "beta must be at least 1, got 0"),
    (lambda m: kv.AdaKV(40, safeguard=2), r"safeguard must be in \[0, 1\], got 2"),
    (lambda m: kv.H2O(0), "budget must be at least 1 tokens, got 0"),
    (lambda m: kv.H2O(10, recent=11), r"recent must be in \[0, 10\], got 11"),
    (lambda m: kv.TOVA(10, interval=0), "interval must be at least 1, got 0"),
    (lambda m: kv.StreamingLLM(-1), "sinks must be at least 0, got -1"),
    (lambda m: kv.HeadwiseKV(torch.rand(3, 2), 1.1), r"sparsity must be in \[0, 1\]"),
    (lambda m: kv.HeadwiseKV(torch.rand(2, 2)), r"gates must have shape \(3, 2\) for this model, got \(2, 2\)"),
    (lambda m: kv.Quest(32), "budget must be at least 64, got 32"),
    (
        lambda m: kv.Quest(summary_dtype=torch.float16),
        "summary_dtype must be None or torch.float8_e4m3fn, got torch.float16",
    ),
    (lambda m: kv.DELTA(512, [1]), "planners must hold at least one layer from 2 on"),
    (lambda m: kv.DELTA(512, [9]), "planners must lie below the model's 3 layers"),
    (lambda m: kv.GemFilter(40, 3), "layer must be below the model's 3 layers, got 3"),
    (lambda m: kv.PromptDistill([40, 20], [1]), "layers must ascend and match budgets"),
    (lambda m: kv.PromptDistill([40], [5]), "layers must be below the model's 3 layers, got 5"),
    (lambda m: kv.FromPress(object()), "press must have score; object has none"),
    (lambda m: kv.SnapKV(40, page_size=10), "page_size must be a divisor of 64, got 10"),
    (lambda m: kv.HeadwiseKV(torch.rand(3, 2), page_size=0), "page_size must be a divisor of 64, got 0"),
    (lambda m: kv.PromptDistill([40], [1], page_size=48), "page_size must be a divisor of 64, got 48"),
    (lambda m: kv.SpecPC(m, 40, first_layer=3), r"first_layer must be in \[0, 2\], got 3"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message for _, message in BAD])
def test_refuses(make, message):
    model = tiny.model("llama")
    with pytest.raises(ValueError, match=message):
        run(model, make(model), *batch())


def test_refuses_models_whose_layers_share_keys_and_other_vocabularies():
    with pytest.raises(ValueError, match="layers that read the keys of earlier ones"):
        run(tiny.model("gemma4"), kv.H2O(40), *batch())
    model = tiny.model("llama")
    other = tiny.model("qwen3")
    size = other.config.vocab_size
    try:
        other.config.vocab_size = 99
        with pytest.raises(ValueError, match="must have the target's vocabulary of 128 tokens, got 99"):
            run(model, kv.SpecKV(other, 80), *batch())
    finally:
        other.config.vocab_size = size
