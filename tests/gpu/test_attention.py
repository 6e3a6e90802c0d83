"""tree_attention and sparse_attention on CUDA: the case tables of the CPU ops, against their definitions."""

import pytest
import torch

import attention_cases
import sparse_cases
from attention_cases import Case
from branchwise import ops
from branchwise.ops.attention import tree_attention_reference
from branchwise.ops.sparse import sparse_attention_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# fp32 takes the plain kernel, which the emulator needs seconds for where there is much to do.
LARGEST = 150_000


def error(actual, exact):
    return (actual.double() - exact).abs().max().item()


def close(actual, reference, inputs):
    """Error at most twice that of the same formula in this dtype, plus its noise floor (flash-attention's rule)."""
    out, lse = actual
    exact, exact_lse = reference(*inputs.args, **inputs.options)
    plain, _ = reference(*inputs.args, **inputs.options, dtype=out.dtype)
    floor = (exact.to(out.dtype).double() - exact).abs().max().item()
    assert error(out, exact) <= 2 * error(plain, exact) + floor + 1e-6
    finite = exact_lse.isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert error(lse[finite], exact_lse[finite]) <= 2e-6 * max(10.0, exact_lse[finite].abs().max().item())


def skip_slow(device, case, dtype):
    plain = dtype == torch.float32 or case.D % 8 or case.D > 256
    if device.emulated and plain and case.B * case.Hq * case.T * (case.prefix + case.T) > LARGEST:
        pytest.skip("too slow in the emulator")


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", attention_cases.CASES, ids=str)
def test_tree_attention(case, dtype, device):
    skip_slow(device, case, dtype)
    inputs = attention_cases.make(case, dtype)
    close(device.tree_attention(*inputs.args, **inputs.options), tree_attention_reference, inputs)


@pytest.mark.parametrize("case", [case for case in attention_cases.CASES if case.page_size in (1, 16)], ids=str)
def test_cascade_attention(case, device):
    inputs = attention_cases.make(case, torch.bfloat16)
    query, key, value, seq_lens, mask = inputs.args
    options = dict(inputs.options)
    close(
        device.cascade_attention(query, key, value, seq_lens, options.pop("page_table"), mask, **options),
        tree_attention_reference,
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("sparse", sparse_cases.CASES, ids=str)
def test_sparse_attention(sparse, dtype, device):
    skip_slow(device, sparse.case, dtype)
    inputs = sparse_cases.make(sparse, dtype)
    close(device.sparse_attention(*inputs.args, **inputs.options), sparse_attention_reference, inputs)


@pytest.mark.parametrize("shape", [dict(T=1, Hq=8), dict(T=7, Hq=6), dict(T=30, Hq=4, page_size=16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=SHORT.get)
def test_bit_equal_in_any_batch_and_cache(shape, dtype, device):
    """A row's result depends on no other row, nor on how large a cache it lies in."""
    prefix = 700 if dtype != torch.float32 else 280  # two splits at least
    inputs = attention_cases.make(Case(B=4, Hkv=2, prefix=prefix, **shape), dtype)
    query, key, value, seq_lens, mask = inputs.args
    table = inputs.options["page_table"]
    out, lse = device.tree_attention(query, key, value, seq_lens, mask, page_table=table)
    for b in range(4):
        row = slice(b, b + 1)
        if table is None:
            length = int(seq_lens[b]) + query.shape[2]
            caches = [torch.cat([c[row, :, :length], c.new_zeros(1, 2, 5 * b, c.shape[3])], 2) for c in (key, value)]
        else:
            caches = [key, value]
        alone = device.tree_attention(
            query[row], *caches, seq_lens[row], mask[row], page_table=None if table is None else table[row]
        )
        assert torch.equal(alone[0], out[row]) and torch.equal(alone[1], lse[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=SHORT.get)
def test_strided_and_unaligned_caches(dtype, device):
    """[B, S, Hkv, D] storage, on 16 bytes and one element off them; the latter takes the plain kernel."""
    inputs = attention_cases.make(Case(B=2, T=5, Hq=6, Hkv=3), dtype)
    query, key, value, seq_lens, mask = inputs.args
    for offset in (0, 1):
        moved = []
        for cache in (key, value):
            B, H, S, D = cache.shape
            view = torch.empty(cache.numel() + 8, dtype=dtype)[offset : offset + cache.numel()]
            moved.append(view.view(B, S, H, D).transpose(1, 2).copy_(cache))
        inputs.args = (query, *moved, seq_lens, mask)
        close(device.tree_attention(*inputs.args), tree_attention_reference, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=SHORT.get)
def test_values_outside_the_cache_are_not_read(dtype, device):
    """Lengths, pages and list entries that lie nowhere: no exception, as nothing looks at values, and no read."""
    inputs = attention_cases.make(Case(B=2, T=3, page_size=16), dtype)
    query, key, value, seq_lens, mask = inputs.args
    table = inputs.options["page_table"].clone()
    expected = device.tree_attention(query, key, value, seq_lens, mask, page_table=table)
    wild = torch.tensor([-(2**31), -1, 0, 2, 7, 2**31 - 1], dtype=torch.int32)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        shapes = {"indices": (2, 1, 5), "counts": (2, 1), "segment_offsets": (2, 1, 4)}
        lists = {name: wild[torch.randint(0, len(wild), shape, generator=g)] for name, shape in shapes.items()}
        out, _ = device.sparse_attention(query, key, value, seq_lens, tree_mask=mask, page_table=table, **lists)
        assert out.isfinite().all()
    table[0, 1], table[0, 2] = 10**6, -1
    out, lse = device.tree_attention(query, key, value, seq_lens, mask, page_table=table)
    assert out.isfinite().all() and not torch.equal(out[0], expected[0][0])
    assert torch.equal(out[1], expected[0][1]) and torch.equal(lse[1], expected[1][1])
    for lens in ([-5, 10], [2**31 - 1, 10]):
        out, _ = device.tree_attention(query, key, value, torch.tensor(lens, dtype=torch.int32), mask, page_table=table)
        assert out.isfinite().all()
    lists = torch.tensor([[[-7, 3, 10**6, 2]]] * 2, dtype=torch.int32)
    for count in (4, -3, 99):
        counts = torch.full((2, 1), count, dtype=torch.int32)
        for unit in (1, 16):
            out, _ = device.sparse_attention(
                query, key, value, seq_lens, indices=lists, counts=counts, unit=unit, tree_mask=mask, page_table=table
            )
            assert out.isfinite().all()


def test_refusals_name_argument_and_value(device):
    query, key, value, seq_lens, mask = attention_cases.make(Case(), torch.bfloat16).args
    with pytest.raises(RuntimeError, match=r"tree_attention: key_cache must be bfloat16, got float32"):
        device.tree_attention(query, key.float(), value, seq_lens, mask)
    with pytest.raises(RuntimeError, match=r"tree_attention: window must be 0 \(none\) or positive, got -1"):
        device.tree_attention(query, key, value, seq_lens, mask, window=-1)
    with pytest.raises(RuntimeError, match="sparse_attention: indices or sink_sizes must be given"):
        device.sparse_attention(query, key, value, seq_lens)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (3, 9, 17, 64), (2, 32, 64, 128), (1, 2, 3, 100)])
def test_merge_attention(shape, dtype, device):
    out_a, out_b = (torch.randn(shape).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(shape[:3]) * 10 for _ in range(2))
    lse_a[..., 0] = -torch.inf
    expected = ops.merge_attention(out_a, lse_a, out_b, lse_b)
    actual = device.merge_attention(out_a, lse_a, out_b, lse_b)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[0], expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=1e-5)
