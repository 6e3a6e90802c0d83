"""rms_norm and apply_rope: their definitions, transformers' own code, and what of a model is taken over."""

import copy

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import branchwise as bw
import tiny
from branchwise import fused, ops
from branchwise.fused import FusedLayers
from branchwise.ops.layer import apply_rope_reference, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = {
    "llama": (llama.LlamaRMSNorm, 0.0, False),
    "olmo2": (Olmo2RMSNorm, 0.0, True),
    "gemma": (GemmaRMSNorm, 1.0, True),
}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def few_differ(actual, expected):
    """Both roundings of a value that another order of sums moved across a border, and no more than some of those."""
    unit = torch.finfo(expected.dtype).eps
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=4 * unit, atol=1e-7)
    if expected.dtype != torch.float32:
        assert (actual != expected).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [(0.0, False), (0.0, True), (1.0, True)], ids=str)
@pytest.mark.parametrize("H", [1, 3, 16, 37, 64, 576, 2050])
def test_norm_matches_definition(H, form, dtype, isa):
    x, weight = draw(2, 5, H, dtype=dtype) * 3, draw(H, dtype=dtype, seed=1)
    few_differ(ops.rms_norm(x, weight, 1e-5, *form), rms_norm_reference(x, weight, 1e-5, *form))
    strided = x.transpose(0, 1)
    assert torch.equal(ops.rms_norm(strided, weight, 1e-5, *form), ops.rms_norm(x, weight, 1e-5, *form).transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norms_row_has_its_bits_among_any_others(dtype, isa, threads):
    x, weight = draw(300, 576, dtype=dtype), draw(576, dtype=dtype, seed=1)
    whole = ops.rms_norm(x, weight, 1e-6)
    for n in (1, 2, 7):
        threads(n)
        assert torch.equal(ops.rms_norm(x, weight, 1e-6), whole)
        assert torch.equal(ops.rms_norm(x[n : n + 1], weight, 1e-6), whole[n : n + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_transformers(name, dtype, isa):
    cls, offset, weight_first = NORMS[name]
    module = cls(64).to(dtype)
    module.weight.data = draw(64, dtype=dtype, seed=1)
    x = draw(9, 64, dtype=dtype)
    with torch.no_grad():
        few_differ(ops.rms_norm(x, module.weight, 1e-6, offset, weight_first), module(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 9, 3, 1, 64), (1, 4, 4, 300, 128), (3, 5, 1, 7, 34)], ids=str)
def test_rope_has_the_bits_of_transformers(shape, dtype, isa):
    B, Hq, Hkv, T, D = shape
    query, key = (draw(B, T, heads, D, dtype=dtype, seed=heads).transpose(1, 2) for heads in (Hq, Hkv))
    for batch in {1, B}:
        cos, sin = draw(batch, T, D, dtype=dtype, seed=7), draw(batch, T, D, dtype=dtype, seed=8)
        ours = ops.apply_rope(query, key, cos, sin)
        for reference in (llama.apply_rotary_pos_emb, apply_rope_reference):
            for actual, expected in zip(ours, reference(query, key, cos, sin), strict=True):
                assert torch.equal(actual, expected)
    assert all(torch.equal(*pair) for pair in zip(ops.apply_rope(query.contiguous(), key, cos, sin), ours, strict=True))


def test_empty():
    assert ops.rms_norm(torch.zeros(0, 8), torch.zeros(8), 0.1).shape == (0, 8)
    query, key = ops.apply_rope(torch.zeros(0, 2, 3, 4), torch.zeros(0, 1, 3, 4), *[torch.zeros(1, 3, 4)] * 2)
    assert query.shape == (0, 2, 3, 4) and key.shape == (0, 1, 3, 4)


def test_opcheck():
    x, weight = draw(3, 20), draw(20, seed=1)
    torch.library.opcheck(torch.ops.branchwise.rms_norm, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.branchwise.rms_norm, (x.t()[:3].t(), weight[:3], 1e-5, 1.0, True))
    angles = draw(1, 5, 8, seed=2)
    torch.library.opcheck(torch.ops.branchwise.apply_rope, (draw(2, 3, 5, 8), draw(2, 1, 5, 8), angles, angles))


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.zeros(()), torch.zeros(3), 0.1), r"x must have shape \[..., H\], got a scalar"),
        ((torch.zeros(2, 0), torch.zeros(0), 0.1), r"x.size\(-1\) must be at least 1"),
        ((torch.zeros(2, 3).double(), torch.zeros(3), 0.1), "x must be float32, bfloat16 or float16, got float64"),
        ((torch.zeros(2, 3), torch.zeros(4), 0.1), r"weight.size\(0\) must be x.size\(-1\) = 3, got shape \[4\]"),
        ((torch.zeros(2, 3), torch.zeros(3).half(), 0.1), "weight must be float32, got float16"),
        ((torch.zeros(2, 3), torch.zeros(6)[::2], 0.1), "weight must be contiguous"),
        ((torch.zeros(2, 3), torch.zeros(3), -1.0), "eps must be finite and not negative, got -1"),
        ((torch.zeros(2, 3), torch.zeros(3, requires_grad=True), 0.1), "is for inference and has no gradient"),
    ],
)
def test_norm_refuses(args, message):
    with pytest.raises(RuntimeError, match=f"rms_norm.*{message}"):
        ops.rms_norm(*args)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": torch.zeros(3, 4, 8)}, r"query must have shape \[B, Hq, T, D\]"),
        ({"query": torch.zeros(2, 3, 4, 8).double()}, "query must be float32, bfloat16 or float16"),
        ({"query": torch.zeros(2, 3, 4, 7)}, r"query.size\(3\) must be even, got shape \[2, 3, 4, 7\]"),
        ({"query": torch.zeros(2, 3, 8, 4).mT}, "query must be contiguous in its last dimension"),
        ({"key": torch.zeros(2, 1, 5, 8)}, r"key.size\(2\) must be that of query = 4"),
        ({"key": torch.zeros(2, 1, 4, 8).half()}, "key must be float32, got float16"),
        ({"cos": torch.zeros(3, 4, 8)}, r"cos.size\(0\) must be 1 or B = 2, got shape \[3, 4, 8\]"),
        ({"sin": torch.zeros(1, 4, 6)}, r"sin.size\(2\) must be D = 8"),
        ({"sin": torch.zeros(1, 4, 8).half()}, "sin must be float32, got float16"),
    ],
)
def test_rope_refuses(changes, message):
    arguments = {"query": torch.zeros(2, 3, 4, 8), "key": torch.zeros(2, 1, 4, 8)}
    arguments |= {"cos": torch.zeros(1, 4, 8), "sin": torch.zeros(1, 4, 8)}
    with pytest.raises(RuntimeError, match=f"apply_rope.*{message}"):
        ops.apply_rope(**arguments | changes)


# ---- what of a model is taken over ----


class Counted:
    def __init__(self, monkeypatch):
        self.calls = dict.fromkeys(("rms_norm", "apply_rope"), 0)
        for name in self.calls:
            monkeypatch.setattr(fused.ops, name, self.wrap(name, getattr(ops, name)))

    def wrap(self, name, op):
        def call(*args):
            self.calls[name] += 1
            return op(*args)

        return call


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


#: Norms and rotations per forward of three layers; what is not taken over (LayerNorm, a part of the head dim, halves
#: that share their angles) computes as before.
TAKEN = {
    **{name: (7, 3) for name in ("llama", "mistral", "phi3", "smollm3", "granite")},
    **{name: (13, 3) for name in ("qwen3", "gemma2", "olmo2")},
    **{"gemma3": (19, 3), "gpt_oss": (7, 0), "gpt_neox": (0, 0)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TAKEN)
def test_layers_of_models(name, dtype, counted):
    model = tiny.model(name, dtype)
    ids = torch.arange(2, 12)[None]
    norms, rotations = TAKEN[name]
    if name == "olmo2" and dtype != torch.float32:
        rotations = 0  # in fp32, which the op is not for
    with torch.no_grad():
        expected = model(ids).logits
        layers = FusedLayers(model)
        counted.calls = dict.fromkeys(counted.calls, 0)
        with layers:
            logits = model(ids).logits
        assert counted.calls == {"rms_norm": norms, "apply_rope": rotations}
        assert torch.equal(model(ids).logits, expected)  # all is as it was
    unit = torch.finfo(dtype).eps
    assert torch.allclose(logits, expected, rtol=64 * unit, atol=64 * unit * expected.abs().max().item())


def test_what_others_have_put_there_stays(counted):
    model = copy.deepcopy(tiny.model("llama"))
    model.model.norm.forward = lambda x: x * 0
    with torch.no_grad(), FusedLayers(model):
        assert not model(torch.ones(1, 3, dtype=torch.int64)).logits.any()
    assert "forward" in model.model.norm.__dict__


def test_classes_that_compute_something_else_stay():
    class OddRMSNorm(llama.LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * 1.01

    model = copy.deepcopy(tiny.model("llama"))
    model.model.norm.__class__ = OddRMSNorm
    layers = FusedLayers(model)
    assert len(layers._norms) == 6


def test_settings_of_a_class_are_tried_each():
    class ChoosyRMSNorm(llama.LlamaRMSNorm):
        from_one = False

        def forward(self, x):
            x = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
            return (x * (self.weight.float() + float(self.from_one))).to(self.weight.dtype)

    model = copy.deepcopy(tiny.model("llama", torch.bfloat16))
    for norm in (model.model.norm, model.model.layers[0].input_layernorm):
        norm.__class__ = ChoosyRMSNorm
    model.model.norm.from_one = True
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with FusedLayers(model):
            logits = model(ids).logits
    assert torch.allclose(logits, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_gradients_and_other_dtypes_go_to_the_original(counted):
    model = tiny.model("llama")
    layers = FusedLayers(model)
    counted.calls = dict.fromkeys(counted.calls, 0)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with layers:
        model(ids).logits.sum().backward()
        with torch.no_grad():
            model.model.norm(torch.zeros(1, 4, model.config.hidden_size, dtype=torch.bfloat16))
    model.zero_grad()
    assert not any(counted.calls.values())


def test_rotations_that_the_op_is_not_for_go_to_the_original(counted):
    layers = FusedLayers(tiny.model("llama"))
    counted.calls = dict.fromkeys(counted.calls, 0)
    query, key, angles = draw(2, 3, 5, 8), draw(2, 1, 5, 8, seed=1), draw(1, 5, 8, seed=2)
    others = [
        [x.double() for x in (query, key, angles, angles)],
        [x.to("meta") for x in (query, key, angles, angles)],
        [query, key, angles.mT.contiguous().mT, angles],  # strided
        [query, key, draw(1, 1, 8), draw(1, 1, 8)],  # one position for all
    ]
    with torch.no_grad(), layers:
        for arguments in others:
            llama.apply_rotary_pos_emb(*arguments)
        assert not counted.calls["apply_rope"]
        llama.apply_rotary_pos_emb(query, key, angles, angles)
    assert counted.calls["apply_rope"] == 1


def test_functions_come_back_whoever_leaves_first():
    own = llama.apply_rotary_pos_emb
    first, second = FusedLayers(tiny.model("llama")), FusedLayers(copy.deepcopy(tiny.model("llama")))
    first.__enter__()
    third = FusedLayers(copy.deepcopy(tiny.model("llama")))  # sees the original behind the replacement
    second.__enter__()
    first.__exit__()
    assert llama.apply_rotary_pos_emb is not own and third._files == first._files
    second.__exit__()
    assert llama.apply_rotary_pos_emb is own


def test_decoding_uses_them(counted):
    model = tiny.model("llama")
    ids = torch.arange(2, 12)[None]
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    assert not counted.calls["rms_norm"]
    ours = model.generate(ids, custom_generate=bw.TreeSpeculation("suffix"), **options)
    assert torch.equal(plain, ours) and counted.calls["rms_norm"] > 10 and counted.calls["apply_rope"] > 4
