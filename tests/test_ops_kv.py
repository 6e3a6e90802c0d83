"""append_kv and commit_kv against their slot-by-slot definitions."""

import pytest
import torch

from branchwise import ops
from branchwise.ops.kv import append_kv_reference, commit_kv_reference


def caches(B, Hkv, D, S, dtype, page_size=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    if not page_size:
        return [torch.randn(B, Hkv, S, D, generator=g).to(dtype) for _ in range(2)], None
    per_row = -(-S // page_size)
    pool = [torch.randn(B * per_row, Hkv, page_size, D, generator=g).to(dtype) for _ in range(2)]
    return pool, torch.randperm(B * per_row, generator=g).int().view(B, per_row)


@pytest.mark.parametrize("page_size", [0, 1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, Hkv, T, D", [(1, 1, 1, 32), (3, 2, 5, 40), (2, 3, 70, 64)])
def test_append_kv(B, Hkv, T, D, dtype, page_size):
    cache, table = caches(B, Hkv, D, 100, dtype, page_size)
    expected = [c.clone() for c in cache]
    seq_lens = torch.tensor([0, 17, 30][:B], dtype=torch.int32)
    key, value = (torch.randn(B, T, Hkv, D).to(dtype).transpose(1, 2) for _ in range(2))
    ops.append_kv(key, value, *cache, seq_lens, table)
    append_kv_reference(key, value, *expected, seq_lens, table)
    assert torch.equal(cache[0], expected[0]) and torch.equal(cache[1], expected[1])


def angles(B, T, R, dtype=torch.float32, seed=5):
    """cos and sin as a rotary embedding gives them: both halves alike."""
    half = torch.rand(B, T, R // 2, generator=torch.Generator().manual_seed(seed)) * 100
    both = torch.cat([half, half], dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, R, shared", [(64, 64, False), (40, 40, True), (80, 20, False), (128, 96, True)])
def test_append_kv_with_rope(D, R, shared, dtype, page_size, isa):
    cache, table = caches(3, 2, D, 60, dtype, page_size)
    expected = [c.clone() for c in cache]
    seq_lens = i32(0, 17, 30)
    key, value = (torch.randn(3, 9, 2, D).to(dtype).transpose(1, 2) for _ in range(2))
    for angle_dtype in {torch.float32, dtype}:
        cos, sin = angles(1 if shared else 3, 9, R, angle_dtype)
        ops.append_kv(key, value, *cache, seq_lens, table, cos=cos, sin=sin)
        append_kv_reference(key, value, *expected, seq_lens, table, cos=cos, sin=sin)
        # one rounding of a value of this size
        torch.testing.assert_close(cache[0], expected[0], atol=2e-6, rtol=torch.finfo(dtype).eps)
        assert torch.equal(cache[1], expected[1])


def test_rope_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    (k, v), _ = caches(2, 3, 64, 20, torch.float32)
    key, value = torch.randn(2, 3, 7, 64), torch.randn(2, 3, 7, 64)
    cos, sin = angles(2, 7, 64)
    ops.append_kv(key, value, k, v, i32(2, 5), cos=cos, sin=sin)
    rotated = apply_rotary_pos_emb(key, key, cos, sin)[1]
    torch.testing.assert_close(k[0, :, 2:9], rotated[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(k[1, :, 5:12], rotated[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("page_size", [0, 1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_commit_kv(dtype, page_size):
    """Layers of different head counts and dims; rows that accept nothing, the root, a chain, a scattered path."""
    B = 4
    small, table = caches(B, 1, 32, 64, dtype, page_size)
    wide, _ = caches(B, 3, 64, 64, dtype, page_size, seed=1)
    cache = [*small, *wide]
    expected = [c.clone() for c in cache]
    accepted = torch.tensor([[-1] * 5, [0, -1, -1, -1, -1], [0, 1, 2, 3, -1], [0, 3, 4, 9, 20]], dtype=torch.int32)
    num_accepted = torch.tensor([0, 1, 4, 5], dtype=torch.int32)
    seq_lens = torch.tensor([0, 3, 11, 40], dtype=torch.int32)
    lengths = ops.commit_kv(cache, accepted, num_accepted, seq_lens, table)
    assert torch.equal(lengths, commit_kv_reference(expected, accepted, num_accepted, seq_lens, table))
    assert lengths.tolist() == [0, 4, 15, 45]
    for actual, wanted in zip(cache, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_commit_then_append_equals_appending_the_path():
    g = torch.Generator().manual_seed(3)
    key, value = (torch.randn(1, 2, 6, 32, generator=g) for _ in range(2))
    seq_lens = torch.tensor([4], dtype=torch.int32)
    (tree_k, tree_v), _ = caches(1, 2, 32, 20, torch.float32)
    (path_k, path_v), _ = caches(1, 2, 32, 20, torch.float32)
    ops.append_kv(key, value, tree_k, tree_v, seq_lens)
    path = torch.tensor([[0, 2, 5]], dtype=torch.int32)
    after = ops.commit_kv([tree_k, tree_v], path, torch.tensor([3], dtype=torch.int32), seq_lens)
    ops.append_kv(key[:, :, [0, 2, 5]], value[:, :, [0, 2, 5]], path_k, path_v, seq_lens)
    assert after.tolist() == [7]
    assert torch.equal(tree_k[:, :, :7], path_k[:, :, :7]) and torch.equal(tree_v[:, :, :7], path_v[:, :, :7])


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_append_kv_refuses_and_writes_nothing():
    (k, v), _ = caches(2, 2, 32, 20, torch.float32)
    before = k.clone()
    new = torch.randn(2, 2, 4, 32)
    with pytest.raises(RuntimeError, match=r"seq_lens\[1\] = 17 plus 4 new slots"):
        ops.append_kv(new, new, k, v, i32(0, 17))
    with pytest.raises(RuntimeError, match=r"value_cache must be float32, got bfloat16"):
        ops.append_kv(new, new, k, v.bfloat16(), i32(0, 1))
    with pytest.raises(RuntimeError, match=r"value.size\(2\)"):
        ops.append_kv(new, new[:, :, :2], k, v, i32(0, 1))
    with pytest.raises(RuntimeError, match=r"key_cache.size\(3\) must be D = 16"):
        ops.append_kv(new[..., :16], new[..., :16], k, v, i32(0, 1))
    cos, sin = angles(2, 4, 32)
    for message, changes in {
        "cos and sin must be given together": {"cos": cos},
        r"cos.size\(1\) must be T = 4": {"cos": cos[:, :3], "sin": sin},
        r"sin.size\(0\) must be B = 2 or 1": {"cos": cos, "sin": sin.repeat(2, 1, 1)[:3]},
        r"sin.size\(2\) must be that of cos": {"cos": cos, "sin": sin[..., :30]},
        r"cos.size\(2\) = 31 must be even": {"cos": cos[..., :31], "sin": sin[..., :31]},
        "cos must be float32 or the dtype of key": {"cos": cos.bfloat16(), "sin": sin},
        "cos must have shape": {"cos": cos[0], "sin": sin},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ops.append_kv(new, new, k, v, i32(0, 1), **changes)
    with pytest.raises(RuntimeError, match=r"page_table\[0, 0\] = 9"):
        ops.append_kv(new, new, k, v, i32(0, 1), torch.full((2, 3), 9, dtype=torch.int32))
    assert torch.equal(k, before)


def test_commit_kv_refuses_and_moves_nothing():
    (k, v), _ = caches(1, 2, 32, 20, torch.float32)
    before = k.clone()
    path = i32(0, 2, 5)[None]
    with pytest.raises(RuntimeError, match=r"num_accepted\[0\] = 4"):
        ops.commit_kv([k, v], path, i32(4), i32(0))
    with pytest.raises(RuntimeError, match=r"accepted\[0, 2\] = 1 must be a node id, ascending"):
        ops.commit_kv([k, v], i32(0, 2, 1)[None], i32(3), i32(0))
    with pytest.raises(RuntimeError, match=r"slot 21, past the 20 slots of caches\[0\]"):
        ops.commit_kv([k, v], path, i32(3), i32(16))
    with pytest.raises(RuntimeError, match=r"caches\[1\]"):
        ops.commit_kv([k, v[:, :, :6]], path, i32(3), i32(4))
    assert torch.equal(k, before)


def test_opcheck():
    (k, v), table = caches(2, 2, 32, 20, torch.float32, page_size=4)
    new = torch.randn(2, 2, 3, 32)
    torch.library.opcheck(torch.ops.branchwise.append_kv, (new, new, k, v, i32(1, 2), table))
    rope = dict(zip(("cos", "sin"), angles(2, 3, 32), strict=True))
    torch.library.opcheck(torch.ops.branchwise.append_kv, (new, new, k, v, i32(1, 2), table), rope)
    (k, v), _ = caches(2, 2, 32, 20, torch.float32)
    arguments = ([k, v], torch.tensor([[0, 2], [0, -1]], dtype=torch.int32), i32(2, 1), i32(1, 2))
    torch.library.opcheck(torch.ops.branchwise.commit_kv, arguments)


def head_caches(B, Hkv, D, page_size, S, seed=0):
    """Pools with pages per head, and their table."""
    g = torch.Generator().manual_seed(seed)
    per_head = -(-S // page_size)
    pools = [torch.randn(B * Hkv * per_head, 1, page_size, D, generator=g) for _ in range(2)]
    return pools, torch.randperm(B * Hkv * per_head, generator=g).int().view(B, Hkv, per_head)


def test_append_and_commit_with_lengths_and_pages_per_head():
    """Every head of a row is like a row of its own."""
    B, Hkv, T, D, page = 2, 3, 5, 16, 4
    pools, table = head_caches(B, Hkv, D, page, 40)
    flat = [pool.clone() for pool in pools]
    lens = torch.tensor([[0, 7, 20], [33, 4, 4]], dtype=torch.int32)
    key, value = torch.randn(2, B, Hkv, T, D).unbind()
    cos, sin = torch.rand(2, B, T, 8).unbind()
    rows = (B * Hkv, 1, T, D)
    angles = [a.repeat_interleave(Hkv, 0) for a in (cos, sin)]
    ops.append_kv(key, value, *pools, lens, table, cos=cos, sin=sin)
    ops.append_kv(
        key.reshape(rows), value.reshape(rows), *flat, lens.flatten(), table.flatten(0, 1), cos=angles[0], sin=angles[1]
    )
    assert all(torch.equal(a, b) for a, b in zip(pools, flat, strict=True))
    accepted, count = torch.tensor([[0, 2, 4], [1, 3, -1]], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)
    after = ops.commit_kv(pools, accepted, count, lens, table)
    repeated = accepted.repeat_interleave(Hkv, 0), count.repeat_interleave(Hkv, 0)
    ops.commit_kv(flat, *repeated, lens.flatten(), table.flatten(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(pools, flat, strict=True))
    assert torch.equal(after, lens + count[:, None])


def test_pages_that_are_not_written_to_may_be_missing():
    pools, table = head_caches(1, 2, 8, 4, 40)
    table[:, :, :2] = -1
    key = torch.randn(1, 2, 3, 8)
    ops.append_kv(key, key, *pools, torch.tensor([9], dtype=torch.int32), table)
    with pytest.raises(RuntimeError, match=r"page_table\[0, 0, 1\] = -1"):
        ops.append_kv(key, key, *pools, torch.tensor([7], dtype=torch.int32), table)


def test_refuses_what_does_not_fit_pages_per_head():
    pools, table = head_caches(1, 2, 8, 4, 40)
    key, lens = torch.zeros(1, 2, 1, 8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="1, as every head has pages of its own"):
        ops.append_kv(key, key, *[pool.view(10, 2, 4, 8) for pool in pools], lens, table)
    with pytest.raises(RuntimeError, match=r"seq_lens.size\(1\) must be Hkv = 2"):
        ops.append_kv(key, key, *pools, torch.zeros(1, 3, dtype=torch.int32), table)
    with pytest.raises(RuntimeError, match="window must be 0 where seq_lens differ between heads"):
        ops.tree_attention(key, *pools, torch.zeros(1, 2, dtype=torch.int32), page_table=table, window=4)
