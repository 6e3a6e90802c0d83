"""Attention over caches in e4m3 against its definition, on every instruction set; every value of the format."""

import dataclasses

import pytest
import torch

import attention_cases
import sparse_cases
from attention_cases import CASES, Case, in_e4m3
from branchwise import ops
from branchwise.ops.attention import tree_attention_reference
from branchwise.ops.sparse import sparse_attention_reference
from path_cases import CHAIN, TREES, same_as_committed
from test_ops_attention import SPLIT_CASES, error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
E4M3 = torch.float8_e4m3fn
FORWARDS = [case for case in CASES if not case.blocks]
# Whose pages rows may have in common.
PAGED = [dataclasses.replace(case, page_size=16) for case in FORWARDS[::3]]


def check(call, reference, inputs):
    """Values are multiplied as they are, so rounding is the query's and the result's, as it is of caches in their
    dtype."""
    out, lse = call(*inputs.args, **inputs.options)
    exact, exact_lse = reference(*inputs.args, **inputs.options)
    plain, _ = reference(*inputs.args, **inputs.options, dtype=out.dtype)
    largest = exact_lse.abs().max().item()
    floor = (exact.to(out.dtype).double() - exact).abs().max().item()
    floor += 2**-24 * largest * exact.abs().max().item()  # one rounding of the logits
    assert error(out, exact) <= 2 * error(plain, exact) + floor + 1e-6
    assert error(lse, exact_lse) <= 2e-6 * max(10.0, largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tree_attention(case, dtype, isa):
    check(ops.tree_attention, tree_attention_reference, in_e4m3(attention_cases.make(case, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", FORWARDS[::2], ids=str)
def test_path_attention(case, dtype, isa):
    check(ops.path_attention, tree_attention_reference, in_e4m3(attention_cases.make(case, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_cascade_attention(case, dtype, isa):
    def call(query, key, value, lens, mask, page_table, **options):
        return ops.cascade_attention(query, key, value, lens, page_table, mask, **options)

    check(call, tree_attention_reference, in_e4m3(attention_cases.make(case, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("sparse", sparse_cases.CASES[::2], ids=str)
def test_sparse_attention(sparse, dtype, isa):
    check(ops.sparse_attention, sparse_attention_reference, in_e4m3(sparse_cases.make(sparse, dtype)))


@pytest.mark.parametrize("rows", [1, 3, 7, 12, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_every_value_of_the_format(dtype, rows, isa):
    """A row per value, of one token, which sees itself alone: out is its value, lse its key; NaN included."""
    codes = torch.arange(256).to(torch.uint8)
    exact = codes.view(E4M3).float()
    cache = codes[:, None, None, None].expand(256, 1, 1, 32).contiguous().view(E4M3)
    query = torch.zeros(256, rows, 1, 32, dtype=dtype)
    query[..., 5] = 1
    factors = {"key_scale": torch.tensor([0.25]), "value_scale": torch.tensor([4.0])}
    lens = torch.zeros(256, dtype=torch.int32)
    out, lse = ops.tree_attention(query, cache, cache, lens, scale=1.0, **factors)
    number = ~exact.isnan()
    expected = (4 * exact[number])[:, None, None, None].expand(254, rows, 1, 32)
    torch.testing.assert_close(out[number].float(), expected, rtol=1e-6, atol=0)  # four bits: no dtype rounds them
    torch.testing.assert_close(lse[number, :, 0], (exact[number] / 4)[:, None].expand(254, rows), rtol=1e-6, atol=1e-6)
    assert out[~number].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_bit_equal_for_any_thread_count(case, dtype, threads):
    inputs = in_e4m3(attention_cases.make(case, dtype))
    threads(1)
    alone = ops.tree_attention(*inputs.args, **inputs.options)
    for n in (2, 7):
        threads(n)
        out, lse = ops.tree_attention(*inputs.args, **inputs.options)
        assert torch.equal(out, alone[0]) and torch.equal(lse, alone[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", TREES[::2], ids=str)
def test_a_node_of_a_path_has_the_bits_of_the_only_token(case, dtype, isa):
    assert same_as_committed(ops.path_attention, in_e4m3(attention_cases.make(case, dtype)))


def test_a_token_of_a_chain_has_the_bits_of_the_only_token(isa):
    inputs = in_e4m3(attention_cases.make(CHAIN, torch.bfloat16))
    assert same_as_committed(ops.path_attention, inputs, [0, 62, 63, 130, CHAIN.T - 1])


def test_unaligned_caches_and_head_dims_with_a_rest(isa):
    """Rows one byte off any alignment and one further apart than they are long."""
    for T, D in ((1, 80), (3, 33), (20, 64), (30, 80)):
        inputs = in_e4m3(attention_cases.make(Case(B=2, T=T, Hq=6, Hkv=3, D=D), torch.bfloat16))
        query, key, value, *rest = inputs.args
        B, H, S, _ = key.shape
        expected = ops.tree_attention(*inputs.args, **inputs.options)
        moved = [torch.empty(B * H * S * (D + 1) + 1, dtype=E4M3)[1:].view(B, H, S, D + 1)[..., :D] for _ in range(2)]
        for to, cache in zip(moved, (key, value), strict=True):
            to.copy_(cache)
        out = ops.tree_attention(query, *moved, *rest, **inputs.options)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_appending_rounds_as_torch_does(dtype, isa):
    """Values of every size, what lies between two of the format, and those beyond its largest."""
    every = torch.arange(256).to(torch.uint8).view(E4M3).float()
    every = every[~every.isnan()].sort().values
    g = torch.Generator().manual_seed(0)
    some = torch.cat([torch.randn(2000, generator=g) * 10.0**p for p in range(-5, 3)])
    values = torch.cat([every, (every[1:] + every[:-1]) / 2, some, torch.tensor([449.0, 464.0, -6e4, torch.inf])])
    D = 37
    rows = values[: len(values) // D * D].view(1, 1, -1, D).to(dtype)
    for scale in (1.0, 0.3):
        cache = [torch.zeros(rows.shape, dtype=E4M3) for _ in range(2)]
        factor, lens = torch.tensor([scale]), torch.zeros(1, dtype=torch.int32)
        ops.append_kv(rows, rows, *cache, lens, key_scale=factor, value_scale=factor)
        expected = (rows.float() / factor).clamp(-448, 448).to(E4M3)
        assert all(torch.equal(c.view(torch.uint8), expected.view(torch.uint8)) for c in cache)
