"""fetch_slots against its definition, and attention through it against attention to the whole store."""

import pytest
import torch

from branchwise import ops
from branchwise.ops.fetch import fetch_slots_reference
from test_ops_scores import DTYPES, LAYOUTS, SHORT, cache_of, int32, lens_of

B, HKV, D, S = 2, 3, 40, 96


def store_of(slots, page_size, dtype, capacity=S, D=D):
    """A faster store that holds nothing."""
    caches = [torch.full((B * HKV * slots, 1, page_size, D), torch.nan).to(dtype) for _ in range(2)]
    table = torch.full((B, HKV, -(-capacity // page_size)), -1, dtype=torch.int32)
    return *caches, table, torch.full((B, HKV, slots), -1, dtype=torch.int32)


def lists_of(lens, unit, share, tokens, g, heads=HKV):
    """Random ascending units of the committed slots, per token and head, and their counts."""
    per_head = lens if lens.dim() == 2 else lens[:, None].expand(B, HKV)
    units = -(-per_head.amin(1) // unit)
    width = int(units.max()) + 1
    indices = torch.zeros(B, tokens, heads, width, dtype=torch.int32)
    counts = torch.zeros(B, tokens, heads, dtype=torch.int32)
    for b, t, h in ((b, t, h) for b in range(B) for t in range(tokens) for h in range(heads)):
        chosen = torch.nonzero(torch.rand(int(units[b]), generator=g) < share).flatten().int()
        indices[b, t, h, : len(chosen)], counts[b, t, h] = chosen, len(chosen)
    return (indices[:, 0].contiguous(), counts[:, 0].contiguous()) if tokens == 1 else (indices, counts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size, unit", [(1, 1), (8, 8), (8, 1), (8, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_fetch_slots_over_a_growing_text(dtype, page_size, unit, layout):
    """Appends, roll-backs and new lists: what is at hand is what the definition says and what the store holds."""
    g = torch.Generator().manual_seed(0)
    *source, table = cache_of(B, HKV, D, S, dtype, layout)
    fast, expected = store_of(-(-S // page_size), page_size, dtype), store_of(-(-S // page_size), page_size, dtype)
    lens = lens_of(layout, 40, 21)
    for step in range(12):
        new = 1 + step % 5
        for cache in source:  # the forward's new slots, perhaps over those of nodes that were rejected
            cache += torch.randn(cache.shape, generator=g).to(dtype) * dirty(cache, lens, new, table)
        indices, counts = lists_of(lens, unit, 0.3, 1 + step % 2, g, heads=HKV if step % 3 else 1)
        got = ops.fetch_slots(*source, table, indices, counts, unit, lens, new, *fast)
        wanted = fetch_slots_reference(*source, table, indices, counts, unit, lens, new, *expected)
        for a, b in zip((*got, *fast), (*wanted, *expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        query = torch.randn(B, 2 * HKV, new, D, generator=g).to(dtype)
        if indices.dim() == 4 and indices.shape[1] != new:
            indices, counts = indices[:, :1].expand(-1, new, -1, -1), counts[:, :1].expand(-1, new, -1)
        if indices.shape[-2] == 1 and lens.dim() == 2:
            continue
        lists = indices.contiguous(), counts.contiguous()
        here = ops.sparse_attention(query, fast[0], fast[1], lens, *lists, unit=unit, page_table=fast[2])
        there = ops.sparse_attention(query, *source, lens, *lists, unit=unit, page_table=table)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
        lens = lens + int(torch.randint(0, new + 1, (), generator=g))


def dirty(cache, lens, new, table):
    """1 where a forward may write: from the first uncommitted slot on."""
    mask = torch.zeros(cache.shape[:3])
    for b in range(B):
        for h in range(HKV):
            begin = int(lens[b] if lens.dim() == 1 else lens[b, h])
            for slot in range(begin, begin + new):
                if table is None:
                    mask[b, h, slot] = 1
                else:
                    page = table[b, slot // 8] if table.dim() == 2 else table[b, h, slot // 8]
                    mask[int(page), h if table.dim() == 2 else 0, slot % 8] = 1
    return mask[..., None].to(cache.dtype)


def test_what_is_loaded_is_what_is_dropped():
    """Lists of equal length, in place: |load| = |drop|, and nothing that stays is copied again."""
    g = torch.Generator().manual_seed(1)
    key, value, _ = cache_of(B, HKV, D, S, torch.float32)
    fast = store_of(8, 8, torch.float32)
    lens = int32(96, 96)
    before = None
    for _ in range(20):
        indices = torch.rand(B, HKV, 12, generator=g).argsort(-1)[..., :8].sort(-1).values.int().contiguous()
        counts = torch.full((B, HKV), 8, dtype=torch.int32)
        _, copied = ops.fetch_slots(key, value, None, indices, counts, 8, lens, 0, *fast)
        assert torch.equal(fast[3].sort(-1).values, indices)
        if before is not None:
            fresh = [[len(set(i.tolist()) - set(j.tolist())) for i, j in zip(*rows, strict=True)]
                     for rows in zip(indices, before, strict=True)]  # fmt: skip
            assert copied.tolist() == fresh
        before = indices


def test_too_many_pages_change_nothing():
    check_too_many_pages(ops)


def check_too_many_pages(on):
    key, value, _ = cache_of(B, HKV, D, S, torch.float32)
    fast = store_of(3, 8, torch.float32)
    before = [t.clone() for t in fast]
    indices = torch.arange(3, dtype=torch.int32).expand(B, HKV, 3).contiguous()
    counts = torch.full((B, HKV), 3, dtype=torch.int32)
    needed, copied = on.fetch_slots(key, value, None, indices, counts, 8, int32(40, 41), 1, *fast)
    assert needed.tolist() == [[4] * HKV] * 2 and int(copied.sum()) == 0
    for a, b in zip(fast, before, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def bad_calls():
    key, value, _ = cache_of(B, HKV, D, S, torch.float32)
    lists = torch.zeros(B, HKV, 2, dtype=torch.int32), torch.ones(B, HKV, dtype=torch.int32)

    def call(indices=lists[0], counts=lists[1], unit=8, lens=None, new=1, source=key, **change):
        fast = dict(zip(("k", "v", "table", "owners"), store_of(4, 8, torch.float32), strict=True)) | change
        return lambda: ops.fetch_slots(
            source, value, None, indices, counts, unit, int32(40, 41) if lens is None else lens, new, *fast.values()
        )

    yield "unit = 3 must divide the page size of key_cache, 8", call(unit=3)
    yield r"counts of row 0, list 0 = 3 must", call(counts=lists[1] * 3)
    yield r"indices of row 0, list 0 hold 12, which", call(indices=lists[0] + 12)
    yield r"indices of row 0, list 0 hold -1, which", call(indices=lists[0] - 1)
    yield r"seq_lens\[1\] = 96 plus 1 new slots", call(lens=int32(3, 96))
    yield "new_tokens must not be negative", call(new=-1)
    yield "value_cache must be float32, got bfloat16", call(v=torch.zeros(B * HKV * 4, 1, 8, D).bfloat16())
    yield r"key_cache.size\(0\) must be B Hkv C = 24", call(k=torch.zeros(23, 1, 8, D))
    yield r"key_cache.size\(3\) must be D = 40", call(k=torch.zeros(24, 1, 8, 8), v=torch.zeros(24, 1, 8, 8))
    yield "same slots for 3 heads", call(source=key[:, :2])
    yield r"owners\[0, 0, 0\] = 12 must", call(owners=torch.full((B, HKV, 4), 12, dtype=torch.int32))
    yield r"owners\[0, 0, 0\] = -14 must", call(owners=torch.full((B, HKV, 4), -14, dtype=torch.int32))
    k, v, table, owners = store_of(4, 8, torch.float32)
    short = table[:, :, :2].contiguous()
    yield (
        "page_table has 2 pages per head; row 0 needs 6",
        lambda: ops.fetch_slots(key, value, None, *lists, 8, int32(40, 41), 1, k, v, short, owners),
    )
    pools = [torch.zeros(9, HKV, 8, D)] * 2
    missing = torch.full((B, 12), 9, dtype=torch.int32)
    yield (
        r"page_table\[0, 0\] = 9 must lie between 0 and 8",
        lambda: ops.fetch_slots(*pools, missing, *lists, 8, int32(40, 41), 1, *store_of(4, 8, torch.float32)),
    )


@pytest.mark.parametrize("message, call", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_opcheck():
    key, value, table = cache_of(B, HKV, D, S, torch.float32, "head_pages")
    lists = torch.zeros(B, HKV, 2, dtype=torch.int32), torch.ones(B, HKV, dtype=torch.int32)
    args = (key, value, table, *lists, 8, lens_of("head_pages", 40, 41), 1, *store_of(4, 8, torch.float32))
    torch.library.opcheck(torch.ops.branchwise.fetch_slots, args)
