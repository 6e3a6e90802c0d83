"""path_attention: the definition of tree_attention, and bits that neither the tree nor what is committed changes."""

import dataclasses

import pytest
import torch

import attention_cases
from attention_cases import CASES, Case
from branchwise import ops
from branchwise.ops.attention import tree_attention_reference
from path_cases import CHAIN, TREES, same_as_committed, scattered

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def error(actual, exact):
    return (actual.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", [case for case in CASES if not case.blocks], ids=str)
def test_matches_definition(case, dtype, isa):
    inputs = attention_cases.make(case, dtype)
    out, lse = ops.path_attention(*inputs.args, **inputs.options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact, exact_lse = tree_attention_reference(*inputs.args, **inputs.options)
    plain, _ = tree_attention_reference(*inputs.args, **inputs.options, dtype=dtype)
    floor = (exact.to(dtype).double() - exact).abs().max().item()
    assert error(out, exact) <= 2 * error(plain, exact) + floor + 1e-6
    assert error(lse, exact_lse) <= 2e-6 * max(10.0, exact_lse.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", TREES, ids=str)
def test_a_node_has_the_bits_of_the_only_token(case, dtype, isa):
    inputs = attention_cases.make(case, dtype)
    assert same_as_committed(ops.path_attention, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_the_order_of_slots_gives_other_bits(dtype, isa):
    """So that the test above can fail."""
    assert not same_as_committed(ops.tree_attention, attention_cases.make(TREES[1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", [CHAIN, dataclasses.replace(CHAIN, T=700, window=300)], ids=str)
def test_a_token_of_a_chain_has_the_bits_of_the_only_token(case, dtype, isa):
    some = [0, 1, 60, 61, 62, 63, 130, 299, case.T // 2, case.T - 2, case.T - 1]
    assert same_as_committed(ops.path_attention, attention_cases.make(case, dtype), some)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", [*TREES, CHAIN], ids=str)
def test_bit_equal_for_any_thread_count(case, dtype, threads):
    inputs = attention_cases.make(case, dtype)
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(ops.path_attention(*inputs.args, **inputs.options))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_nodes_may_see_any_earlier_ones(dtype, isa):
    """Paths that share some nodes but not their starts, as those of lookahead's window do: nothing is taken over."""
    inputs = scattered(dtype)
    exact, _ = tree_attention_reference(*inputs.args, **inputs.options)
    out, _ = ops.path_attention(*inputs.args, **inputs.options)
    assert error(out, exact) <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert same_as_committed(ops.path_attention, inputs)


def test_heads_of_different_lengths(isa):
    inputs = attention_cases.make(Case(T=9, B=2, Hq=6, Hkv=3, prefix=400), torch.bfloat16)
    query, key, value, lens, mask = inputs.args
    lens = lens[:, None] - torch.tensor([0, 17, 130], dtype=torch.int32)
    out, lse = ops.path_attention(query, key, value, lens, mask)
    for h in range(3):
        heads = slice(2 * h, 2 * h + 2)
        one, one_lse = ops.path_attention(
            query[:, heads], key[:, h : h + 1], value[:, h : h + 1], lens[:, h].contiguous(), mask
        )
        assert torch.equal(one, out[:, heads]) and torch.equal(one_lse, lse[:, heads])


def test_no_rows():
    cache = torch.zeros(1, 2, 16, 32)
    out, lse = ops.path_attention(torch.zeros(0, 4, 3, 32), cache[:0], cache[:0], torch.zeros(0, dtype=torch.int32))
    assert out.shape == (0, 4, 3, 32) and lse.shape == (0, 4, 3)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("seq_lens must have shape", {"seq_lens": torch.zeros(2, 2, 2, dtype=torch.int32)}),
        (r"page_table\[1, 0\] = 99", {"page_table": torch.tensor([[0, 1], [99, 2]], dtype=torch.int32)}),
        (r"seq_lens\[0\] = 1000 plus 3 new", {"seq_lens": torch.tensor([1000, 3], dtype=torch.int32)}),
        ("window must be 0", {"window": -1}),
        ("softcap must be 0", {"softcap": float("nan")}),
        ("no gradient", {"query": torch.zeros(2, 4, 3, 64, requires_grad=True)}),
        (r"tree_mask\[0, 1\] has bit 2 set; a path ends", {"tree_mask": torch.tensor([[[1], [7], [7]]] * 2)}),
        (r"tree_mask\[1, 2\] lacks its own bit", {"tree_mask": torch.tensor([[[1], [3], [5]], [[1], [3], [3]]])}),
        ("query must be", {"query": torch.zeros(2, 4, 3, 64, dtype=torch.float64)}),
    ],
)
def test_refuses(message, changes):
    inputs = attention_cases.make(Case(B=2, T=3, prefix=20, page_size=16), torch.float32)
    names = ["query", "key_cache", "value_cache", "seq_lens", "tree_mask"]
    with pytest.raises(RuntimeError, match=message):
        ops.path_attention(**{**dict(zip(names, inputs.args, strict=True)), **inputs.options, **changes})


def test_opcheck():
    inputs = attention_cases.make(dataclasses.replace(TREES[3], softcap=2.0), torch.float32)
    torch.library.opcheck(torch.ops.branchwise.path_attention, inputs.args, inputs.options)
