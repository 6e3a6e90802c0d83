"""Caches in e4m3 with a factor per head, on the CPU, in the emulator and on a device."""

import pytest
import torch
from test_attention import error

import attention_cases
import sparse_cases
from attention_cases import Case, in_e4m3
from branchwise import ops
from branchwise.ops.attention import tree_attention_reference
from branchwise.ops.kv import append_kv_reference
from branchwise.ops.sparse import sparse_attention_reference
from path_cases import TREES, same_as_committed
from test_ops_kv import angles, caches, head_caches, i32

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
E4M3 = torch.float8_e4m3fn
CASES = [
    Case(T=1, Hq=9, Hkv=3, prefix=1000),
    Case(T=7, Hq=8, Hkv=2, D=128, B=3, page_size=16),
    Case(T=40, D=64, B=2, prefix=200, sinks=True, softcap=5.0),
    Case(T=5, D=48, B=2, window=30),
    Case(T=70, D=112, Hq=4, Hkv=1, prefix=33),
    Case(T=6, D=256, page_size=16),  # these three: the plain kernel
    Case(T=5, D=40, B=2),
    Case(T=3, D=7),
]
SPARSE = [s for s in sparse_cases.CASES if not s.segments and s.case.T * s.case.prefix <= 20_000]


@pytest.fixture(scope="module", params=["cpu", "other"])
def on(request, device):
    """The CPU's ops in the place of the device, and the device."""
    return ops if request.param == "cpu" else device


def check(call, reference, inputs):
    """Error at most twice that of the formula in the query's dtype, plus its epsilon."""
    out, lse = call(*inputs.args, **inputs.options)
    exact, exact_lse = reference(*inputs.args, **inputs.options)
    plain, _ = reference(*inputs.args, **inputs.options, dtype=out.dtype)
    eps = torch.finfo(out.dtype).eps
    assert error(out, exact) <= 2 * error(plain, exact) + eps * exact.abs().max().item() + 1e-6
    assert error(lse, exact_lse) <= (eps + 2e-6) * max(10.0, exact_lse.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tree_attention(case, dtype, on):
    check(on.tree_attention, tree_attention_reference, in_e4m3(attention_cases.make(case, dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_path_attention(case, dtype, on):
    check(on.path_attention, tree_attention_reference, in_e4m3(attention_cases.make(case, dtype)))


@pytest.mark.parametrize("case", TREES[1:8:2], ids=str)
def test_a_node_of_a_path_has_the_bits_of_the_only_token(case, on):
    inputs = in_e4m3(attention_cases.make(case, torch.bfloat16))
    assert same_as_committed(on.path_attention, inputs, range(0, case.T, 5))


def test_cascade_attention(on):
    inputs = in_e4m3(attention_cases.make(CASES[1], torch.bfloat16))

    def call(query, key, value, lens, mask, page_table, **options):
        return on.cascade_attention(query, key, value, lens, page_table, mask, **options)

    check(call, tree_attention_reference, inputs)


@pytest.mark.parametrize("sparse", SPARSE, ids=str)
def test_sparse_attention(sparse, on):
    inputs = in_e4m3(sparse_cases.make(sparse, torch.bfloat16))
    check(on.sparse_attention, sparse_attention_reference, inputs)


def test_values_and_their_rounding(on):
    """All 256 values survive; others go to the nearest, ties to even, up to the largest, as in torch."""
    every = torch.arange(256).to(torch.uint8).view(E4M3).float()
    every = every[~every.isnan()]
    middles = (every.sort().values[1:] + every.sort().values[:-1]) / 2
    g = torch.Generator().manual_seed(0)
    some = torch.cat([torch.randn(3000, generator=g) * 10.0**p for p in range(-5, 3)])
    values = torch.cat([every, middles, some, torch.tensor([449.0, 463.0, 464.0, -1e9, torch.inf])])
    key = values.view(1, 1, -1, 1).contiguous()
    cache = [torch.zeros(1, 1, len(values), 1, dtype=E4M3) for _ in range(2)]
    ones = torch.ones(1)
    on.append_kv(key, key, *cache, i32(0), key_scale=ones, value_scale=ones)
    expected = values.clamp(-448, 448).to(E4M3)
    assert torch.equal(cache[0].flatten().view(torch.uint8), expected.view(torch.uint8))
    nan = torch.full((1, 1, 1, 1), torch.nan)
    on.append_kv(nan, nan, *cache, i32(3), key_scale=ones, value_scale=ones)
    assert cache[1].float()[0, 0, 3].isnan()


@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_and_commit(dtype, page_size, on):
    D, T = 24, 5
    pools, table = caches(2, 3, D, 40, dtype, page_size)
    pools = [p.to(E4M3) for p in pools]
    expected = [p.clone() for p in pools]
    key, value = (torch.randn(2, 3, T, D, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    options = {"key_scale": torch.tensor([0.1, 0.2, 3.0]), "value_scale": torch.tensor([1.0, 0.01, 7.0])}
    cos, sin = angles(1, T, 16, torch.float32)
    on.append_kv(key, value, *pools, i32(3, 20), table, **options)
    append_kv_reference(key, value, *expected, i32(3, 20), table, **options)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(pools, expected, strict=True))
    on.append_kv(key, value, *pools, i32(3, 20), table, **options, cos=cos, sin=sin)
    append_kv_reference(key, value, *expected, i32(3, 20), table, **options, cos=cos, sin=sin)
    # Angles in fp32 and fp64 may round to neighbours.
    torch.testing.assert_close(pools[0].float(), expected[0].float(), rtol=0.13, atol=2**-9)
    assert torch.equal(pools[1].view(torch.uint8), expected[1].view(torch.uint8))
    path, count = torch.tensor([[0, 2, 4], [1, 3, -1]], dtype=torch.int32), i32(3, 2)
    as_bytes = [p.view(torch.uint8).to(torch.float16) for p in pools]
    on.commit_kv(pools, path, count, i32(3, 20), table)
    ops.commit_kv(as_bytes, path, count, i32(3, 20), table)
    assert all(torch.equal(a.view(torch.uint8), b.to(torch.uint8)) for a, b in zip(pools, as_bytes, strict=True))


def test_pages_per_head(on):
    pools, table = head_caches(2, 3, 64, 8, 40)
    pools = [p.to(E4M3) for p in pools]
    lens = torch.tensor([[0, 7, 20], [33, 4, 4]], dtype=torch.int32)
    query = torch.randn(2, 6, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    scales = {"key_scale": torch.tensor([0.5, 1.0, 2.0]), "value_scale": torch.tensor([2.0, 1.0, 0.5])}
    ranges = {"sink_sizes": torch.full((3,), 2**31 - 1).int(), "recent_sizes": torch.full((3,), 2**31 - 1).int()}
    out, _ = on.sparse_attention(query, *pools, lens, **ranges, page_table=table, **scales)
    exact, _ = sparse_attention_reference(query, *pools, lens, **ranges, page_table=table, **scales)
    assert error(out, exact) < 0.03


def test_refuses(on):
    query, lens = torch.zeros(1, 2, 1, 16), i32(3)
    cache, plain, scale = torch.zeros(1, 2, 8, 16).to(E4M3), torch.zeros(1, 2, 8, 16), torch.ones(2)
    with pytest.raises(RuntimeError, match="key_cache must be float8_e4m3fn, got float32"):
        on.tree_attention(query, plain, plain, lens, key_scale=scale, value_scale=scale)
    with pytest.raises(RuntimeError, match="key_cache must be float32, got float8_e4m3fn"):
        on.tree_attention(query, cache, cache, lens)
    with pytest.raises(RuntimeError, match="key_scale and value_scale must be given together"):
        on.append_kv(query, query, cache, cache, lens, key_scale=scale)
    with pytest.raises(RuntimeError, match=r"value_scale.size\(0\) must be Hkv = 2"):
        on.tree_attention(query, cache, cache, lens, key_scale=scale, value_scale=torch.ones(3))
    if on is ops:  # values are not looked at on a GPU
        for bad in (0.0, -1.0, torch.nan, torch.inf):
            with pytest.raises(RuntimeError, match=r"key_scale\[1\] = .* must be positive and finite"):
                on.append_kv(query, query, cache, cache, lens, key_scale=torch.tensor([1.0, bad]), value_scale=scale)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        on.evict_kv(cache, cache, torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32))
