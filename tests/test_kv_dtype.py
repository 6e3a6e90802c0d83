"""KV caches in e4m3: what is stored, that logits are those of a model whose keys and values are rounded, and texts."""

import pytest
import torch
from transformers import DynamicCache

import branchwise as bw
import tiny
from branchwise import KVStore, measure_kv_scales
from branchwise.attention import use_attention
from branchwise.cache import CACHE_NAME
from branchwise.drafters import EarlyExit
from branchwise.forward import StoredModel
from random_drafter import RandomTrees

E4M3 = torch.float8_e4m3fn
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NAMES = ["llama", "qwen3", "gemma2", "gpt_neox", "gpt_oss"]


class RoundedCache(DynamicCache):
    """What plain transformers would attend to."""

    def __init__(self, scales):
        super().__init__()
        self.scales = scales

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rounded = (
            (x / scale[:, None, None]).clamp(-448, 448).to(E4M3).float() * scale[:, None, None]
            for x, scale in zip((key_states, value_states), self.scales[layer_idx], strict=True)
        )
        return super().update(*rounded, layer_idx, *args, **kwargs)


def text_of(model, drafter, **options):
    ids, mask = tiny.prompts(4, 21, longest=200)
    spec = bw.TreeSpeculation(drafter, adaptive=False, seed=5, kv_dtype=options.pop("kv_dtype", E4M3))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [], **options}
    return model.generate(ids, attention_mask=mask, custom_generate=spec, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_rounded_keys_and_values(name):
    model = tiny.model(name)
    scales = measure_kv_scales(model)
    ids = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids, **{CACHE_NAME: RoundedCache(scales)}).logits
        exact = model(ids).logits
        with use_attention(model):
            store = KVStore(1, 64, scales)
            logits = StoredModel(model, store).forward(ids, torch.arange(60)[None])
    close = (logits - expected).abs().max()
    assert close < 1e-4 * expected.abs().max()
    assert (logits - exact).abs().max() > 30 * close  # so that the line above can fail
    assert store.layers[0].keys.dtype == E4M3


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral"])
def test_texts_do_not_depend_on_drafts(name, dtype, sampled):
    model = tiny.model(name, dtype)
    options = {"do_sample": sampled}
    plain = text_of(model, "none", **options)
    for seed in range(3):
        assert torch.equal(text_of(model, RandomTrees(plain.tolist(), seed), **options), plain)
    assert torch.equal(text_of(model, "suffix", **options), plain)


def test_a_row_says_what_it_says_alone():
    model = tiny.model("llama", torch.bfloat16)
    ids, mask = tiny.prompts(4, 21, longest=200)
    together = text_of(model, "none")
    spec = bw.TreeSpeculation("none", kv_dtype=E4M3)
    for b in range(4):
        own = ids[b : b + 1, mask[b].bool()]
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": []}
        assert torch.equal(model.generate(own, custom_generate=spec, **options)[0, own.shape[1] :], together[b])


def test_it_is_another_model():
    """So that the tests above can fail: rounding changes what is said."""
    model = tiny.model("llama")
    texts = [text_of(model, "none", kv_dtype=dtype, max_new_tokens=100) for dtype in (None, E4M3)]
    assert not torch.equal(*texts)


def filled(scales, batch=3, capacity=64):
    store = KVStore(batch, capacity, scales)
    g = torch.Generator().manual_seed(2)
    store.reserve(40)
    for layer in range(len(scales)):
        store.update(*(torch.randn(batch, 2, 40, 16, generator=g) for _ in range(2)), layer)
    store.advance(torch.tensor([40, 7, 25], dtype=torch.int32))
    return store


def as_bytes(store, row):
    return [cache.view(torch.uint8).clone() for layer in range(2) for cache in store.row(layer, row)]


def test_rows_survive_growth_selection_and_copies():
    store = filled([(torch.full((2,), 0.5), torch.ones(2))] * 2)
    assert store.num_bytes == 2 * 2 * 3 * 2 * 64 * 16
    rows = [as_bytes(store, row) for row in range(3)]
    store.reserve(200)
    assert store.capacity > 64
    other = store.copy_rows([2, 0, 2])
    store.select_rows([2, 1])
    for held, row, of in ((store, 0, 2), (store, 1, 1), (other, 1, 0), (other, 2, 2)):
        assert all(torch.equal(a, b) for a, b in zip(as_bytes(held, row), rows[of], strict=True))
    assert other.layers[0].keys.dtype == E4M3 and other.scales is store.scales


def test_measured_factors():
    model = tiny.model("llama")
    scales = measure_kv_scales(model)
    again = measure_kv_scales(model)
    assert len(scales) == 3
    for (key, value), same in zip(scales, again, strict=True):
        assert key.shape == value.shape == (2,) and key.dtype == torch.float32
        assert torch.equal(key, same[0]) and torch.equal(value, same[1])
        assert (torch.frexp(torch.cat([key, value])).mantissa == 0.5).all()  # powers of two
    text = torch.randint(128, (50,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), use_attention(model):
        store = KVStore(1, 50)
        StoredModel(model, store).extend([text])
    for layer, pair in enumerate(measure_kv_scales(model, text)):
        for cache, scale in zip(store.row(layer, 0), pair, strict=True):
            largest = cache.abs().amax((1, 2)) / scale
            assert ((largest >= 32) & (largest < 64)).all()


def test_heads_without_values_get_a_factor():
    model = tiny.model("llama")
    weight = model.model.layers[1].self_attn.v_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[:8] = 0  # of head 0
        assert measure_kv_scales(model)[1][1][0] == 1
        text_of(model, "none")
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_refusals():
    with pytest.raises(ValueError, match=r"None or torch\.float8_e4m3fn, got torch\.float8_e5m2"):
        bw.TreeSpeculation(kv_dtype=torch.float8_e5m2)
    model = tiny.model("llama")
    short = StoredModel(model, KVStore(1, 64, measure_kv_scales(model)[:2]))
    with torch.no_grad(), use_attention(model), pytest.raises(ValueError, match="every layer, got 2 and layer 2"):
        short.extend([torch.arange(3)])
    for bad in (torch.ones(0, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match="tokens must be one text of at least one token, got shape"):
            measure_kv_scales(model, bad)
    with pytest.raises(ValueError, match="not in e4m3"):
        text_of(model, EarlyExit(1))
    bw.patch(model, bw.kv.StreamingLLM(64))
    try:
        with pytest.raises(
            ValueError, match="kv_dtype goes without a KV policy so far, and the model has StreamingLLM"
        ):
            text_of(model, "none")
    finally:
        bw.unpatch(model)
    with pytest.raises(ValueError, match=r"Gemma4.* has layers that share keys and values"):
        text_of(tiny.model("gemma4"), "none")
