"""append_kv, commit_kv and build_tree on CUDA: what the CPU ops write, bit for bit where nothing is computed."""

import pytest
import torch

from attention_cases import random_parents
from branchwise import ops
from test_ops_kv import angles, caches, head_caches, i32


@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, Hkv, T, D", [(1, 1, 1, 32), (3, 2, 5, 40), (2, 3, 70, 64)])
def test_append_kv(B, Hkv, T, D, dtype, page_size, device):
    cache, table = caches(B, Hkv, D, 100, dtype, page_size)
    expected = [c.clone() for c in cache]
    seq_lens = torch.tensor([0, 17, 30][:B], dtype=torch.int32)
    key, value = (torch.randn(B, T, Hkv, D).to(dtype).transpose(1, 2) for _ in range(2))
    device.append_kv(key, value, *cache, seq_lens, table)
    ops.append_kv(key, value, *expected, seq_lens, table)
    assert all(torch.equal(a, b) for a, b in zip(cache, expected, strict=True))


@pytest.mark.parametrize("angle_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, R", [(64, 64), (40, 16), (8, 0)])
def test_append_kv_with_rope(D, R, dtype, angle_dtype, device):
    B, Hkv, T = 2, 3, 5
    cache, table = caches(B, Hkv, D, 40, dtype, 4)
    expected = [c.clone() for c in cache]
    key, value = torch.randn(2, B, Hkv, T, D).to(dtype).unbind()
    cos, sin = angles(1, T, R, angle_dtype or dtype)
    device.append_kv(key, value, *cache, i32(3, 20), table, cos=cos, sin=sin)
    ops.append_kv(key, value, *expected, i32(3, 20), table, cos=cos, sin=sin)
    tolerance = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(cache[0], expected[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(cache[1], expected[1])


@pytest.mark.parametrize("D", [64, 36])
@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_commit_kv(dtype, page_size, D, device):
    """More caches than one launch takes; rows that accept nothing, the root, a chain, a scattered path."""
    layers = [caches(4, 1 + i % 3, D, 64, dtype, page_size, seed=i) for i in range(15)]
    cache, table = [c for pair, _ in layers for c in pair], layers[0][1]
    expected = [c.clone() for c in cache]
    path = torch.full((4, 12), -1, dtype=torch.int32)
    path[1, 0], path[2, :4] = 0, torch.arange(4)
    path[3, :11] = torch.tensor([0, 3, 4, 9, 10, 11, 12, 13, 17, 19, 20])
    args = path, i32(0, 1, 4, 11), i32(0, 3, 11, 40), table
    assert torch.equal(device.commit_kv(cache, *args), ops.commit_kv(expected, *args))
    assert all(torch.equal(a, b) for a, b in zip(cache, expected, strict=True))


def test_lengths_and_pages_per_head(device):
    pools, table = head_caches(2, 3, 16, 4, 40)
    expected = [pool.clone() for pool in pools]
    lens = torch.tensor([[0, 7, 20], [33, 4, 4]], dtype=torch.int32)
    key, value = torch.randn(2, 2, 3, 5, 16).unbind()
    path, count = torch.tensor([[0, 2, 4], [1, 3, -1]], dtype=torch.int32), i32(3, 2)
    for on, cache in ((device, pools), (ops, expected)):
        on.append_kv(key, value, *cache, lens, table)
        after = on.commit_kv(cache, path, count, lens, table)
        assert torch.equal(after, lens + count[:, None])
    assert all(torch.equal(a, b) for a, b in zip(pools, expected, strict=True))


def test_commit_without_caches(device):
    assert device.commit_kv([], torch.zeros(2, 1, dtype=torch.int32), i32(1, 0), i32(5, 6), None).tolist() == [6, 6]


def test_slots_outside_the_cache_are_not_written(device):
    cache, table = caches(2, 1, 8, 16, torch.float32, 4)
    table[0, 1] = 99
    before = [c.clone() for c in cache]
    key, value = torch.randn(2, 2, 1, 3, 8).unbind()
    device.append_kv(key, value, *cache, i32(4, 1000), table)
    device.commit_kv(cache, torch.tensor([[2, 50], [-9, 3]], dtype=torch.int32), i32(9, 2), i32(-3, 13), table)
    assert all(torch.equal(a, b) for a, b in zip(cache, before, strict=True))


@pytest.mark.parametrize("T", [1, 7, 64, 65, 300])
def test_build_tree(T, device):
    parents = random_parents(3, T, torch.Generator().manual_seed(T))
    seq_lens = i32(0, 5, 10**6)
    for actual, expected in zip(device.build_tree(parents, seq_lens), ops.build_tree(parents, seq_lens), strict=True):
        assert torch.equal(actual, expected)
