"""path_attention on CUDA: its definition, and the bits of the only token, whatever tree, batch or cache it is in."""

import dataclasses

import pytest
import torch
from test_attention import DTYPES, LARGEST, SHORT, close, skip_slow

import attention_cases
from attention_cases import Case
from branchwise.ops.attention import tree_attention_reference
from path_cases import CHAIN, TREES, same_as_committed, scattered

# Whole stretches of 1024 slots behind 4096, and a window that begins in one.
LONG = [
    Case(T=6, Hq=4, Hkv=1, prefix=5400),
    Case(T=5, Hq=2, Hkv=1, D=128, prefix=5200, window=900, page_size=16),
    Case(T=4, Hq=2, Hkv=1, D=256, prefix=300, B=2),
]
CHAINS = [CHAIN, dataclasses.replace(CHAIN, window=130, B=1)]


def small(case):
    return case.B * case.Hq * case.T * (case.prefix + case.T) <= 4 * LARGEST and not case.blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", [case for case in attention_cases.CASES if small(case)], ids=str)
def test_matches_definition(case, dtype, device):
    skip_slow(device, case, dtype)
    inputs = attention_cases.make(case, dtype)
    close(device.path_attention(*inputs.args, **inputs.options), tree_attention_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", [*TREES, *LONG], ids=str)
def test_a_node_has_the_bits_of_the_only_token(case, dtype, device):
    skip_slow(device, case, dtype)
    inputs = attention_cases.make(case, dtype)
    nodes = range(0, case.T, 1 if case.T <= 12 else 5)
    assert same_as_committed(device.path_attention, inputs, nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=SHORT.get)
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_a_token_of_a_chain_has_the_bits_of_the_only_token(case, dtype, device):
    skip_slow(device, case, dtype)
    some = [0, 62, 63, 130, case.T - 1]
    assert same_as_committed(device.path_attention, attention_cases.make(case, dtype), some)


def test_the_order_of_slots_gives_other_bits(device):
    """So that the tests above can fail."""
    assert not same_as_committed(device.tree_attention, attention_cases.make(TREES[1], torch.bfloat16))


def test_nodes_may_see_any_earlier_ones(device):
    inputs = scattered(torch.bfloat16)
    close(device.path_attention(*inputs.args, **inputs.options), tree_attention_reference, inputs)
    assert same_as_committed(device.path_attention, inputs, range(0, 90, 17))


@pytest.mark.parametrize("shape", [dict(T=1, tree=False), dict(T=1), dict(T=7), dict(T=70, tree=False)], ids=str)
def test_bit_equal_in_any_batch_and_cache(shape, device):
    inputs = attention_cases.make(Case(B=3, Hq=6, Hkv=2, prefix=600, **shape), torch.bfloat16)
    query, key, value, seq_lens, mask = inputs.args
    out, lse = device.path_attention(*inputs.args)
    for b in range(3):
        row, length = slice(b, b + 1), int(seq_lens[b]) + query.shape[2]
        caches = [torch.cat([c[row, :, :length], c.new_zeros(1, 2, 900 * b, c.shape[3])], 2) for c in (key, value)]
        alone = device.path_attention(query[row], *caches, seq_lens[row], None if mask is None else mask[row])
        assert torch.equal(alone[0], out[row]) and torch.equal(alone[1], lse[row])


def test_heads_of_different_lengths(device):
    query, key, value, lens, mask = attention_cases.make(Case(T=9, B=2, Hq=6, Hkv=3, prefix=400), torch.bfloat16).args
    lens = lens[:, None] - torch.tensor([0, 17, 130], dtype=torch.int32)
    out, lse = device.path_attention(query, key, value, lens, mask)
    for h in range(3):
        heads = slice(2 * h, 2 * h + 2)
        one = device.path_attention(
            query[:, heads], key[:, h : h + 1], value[:, h : h + 1], lens[:, h].contiguous(), mask
        )
        assert torch.equal(one[0], out[:, heads]) and torch.equal(one[1], lse[:, heads])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=SHORT.get)
def test_values_outside_the_cache_are_not_read(dtype, device):
    """Lengths, pages and mask bits that lie nowhere: no exception, as nothing looks at values, and no read."""
    inputs = attention_cases.make(Case(B=2, T=3, prefix=290, page_size=16), dtype)
    query, key, value, seq_lens, mask = inputs.args
    table = inputs.options["page_table"].clone()
    expected = device.path_attention(query, key, value, seq_lens, mask, page_table=table)
    table[0, 1], table[0, 2] = 10**6, -1
    out, _ = device.path_attention(query, key, value, seq_lens, mask, page_table=table)
    assert out.isfinite().all() and torch.equal(out[1], expected[0][1])
    for wild in (mask, torch.full_like(mask, -1), torch.zeros_like(mask)):
        for lens in ([-5, 10], [2**31 - 1, 10]):
            lens = torch.tensor(lens, dtype=torch.int32)
            out, _ = device.path_attention(query, key, value, lens, wild, page_table=table)
            assert out.isfinite().all()
    nothing = torch.zeros_like(seq_lens)
    out, lse = device.path_attention(query, key, value, nothing, torch.zeros_like(mask), page_table=table)
    assert not out.any() and bool((lse == -torch.inf).all())


def test_refusals_name_argument_and_value(device):
    query, key, value, seq_lens, mask = attention_cases.make(Case(), torch.bfloat16).args
    with pytest.raises(RuntimeError, match=r"path_attention: key_cache must be bfloat16, got float32"):
        device.path_attention(query, key.float(), value, seq_lens, mask)
    with pytest.raises(RuntimeError, match=r"path_attention: window must be 0 \(none\) or positive, got -1"):
        device.path_attention(query, key, value, seq_lens, mask, window=-1)
    out, lse = device.path_attention(query[:0], key[:0], value[:0], seq_lens[:0])
    assert out.shape[0] == lse.shape[0] == 0
