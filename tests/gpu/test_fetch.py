"""fetch_slots on CUDA, over a growing text: the CPU op is the oracle, down to where pages lie."""

import pytest
import torch

from branchwise import ops
from test_ops_fetch import HKV, B, D, S, check_too_many_pages, dirty, lists_of, store_of
from test_ops_scores import LAYOUTS, cache_of, int32, lens_of


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size, unit", [(1, 1), (8, 8), (8, 4)])
@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, D), (torch.float32, D), (torch.float16, 7)], ids=str)
def test_growing_text(dtype, width, page_size, unit, layout, device):
    g = torch.Generator().manual_seed(0)
    *source, table = cache_of(B, HKV, width, S, dtype, layout)
    ours, theirs = (list(store_of(-(-S // page_size), page_size, dtype, D=width)) for _ in range(2))
    lens = lens_of(layout, 40, 21)
    for step in range(6):
        new = 1 + step % 5
        for cache in source:
            cache += torch.randn(cache.shape, generator=g).to(dtype) * dirty(cache, lens, new, table)
        indices, counts = lists_of(lens, unit, 0.3, 1 + step % 2, g, heads=HKV if step % 3 else 1)
        got = device.fetch_slots(*source, table, indices, counts, unit, lens, new, *ours)
        wanted = ops.fetch_slots(*source, table, indices, counts, unit, lens, new, *theirs)
        for a, b in zip((*got, *ours), (*wanted, *theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        lens = lens + int(torch.randint(0, new + 1, (), generator=g))


def test_too_many_pages_change_nothing(device):
    check_too_many_pages(device)


def test_values_outside(device):
    """Lists, counts, lengths, owners and tables that point outside: nothing is read or written there."""
    g = torch.Generator().manual_seed(3)
    wild = torch.tensor([-(2**31), -97, -1, 3, 11, 12, 10**6, 2**31 - 1], dtype=torch.int32)

    def draw(*shape):
        return wild[torch.randint(0, len(wild), shape, generator=g)]

    pools = [torch.randn(9, HKV, 8, D) for _ in range(2)]
    for _ in range(5):
        fast = list(store_of(5, 8, torch.float32))
        fast[3] = draw(B, HKV, 5)
        lists = draw(B, 2, HKV, 6), draw(B, 2, HKV)
        device.fetch_slots(*pools, draw(B, 12), *lists, 4, draw(B), 3, *fast)
        assert int(fast[2].max()) < B * HKV * 5


def test_pinned_source():
    if not (ops.CUDA_LOADED and torch.cuda.is_available()):
        pytest.skip("needs a CUDA device")
    key, value, _ = cache_of(B, HKV, D, S, torch.bfloat16)
    lists = torch.arange(4, dtype=torch.int32).expand(B, HKV, 4).contiguous(), torch.full((B, HKV), 4).int()
    fast = [x.cuda() for x in store_of(12, 8, torch.bfloat16)]
    rest = [x.cuda() for x in (*lists, int32(40, 41))]
    with pytest.raises(RuntimeError, match="key_source must be on the GPU or in pinned memory"):
        ops.fetch_slots(key, value, None, rest[0], rest[1], 8, rest[2], 1, *fast)
    _, copied = ops.fetch_slots(key.pin_memory(), value.pin_memory(), None, rest[0], rest[1], 8, rest[2], 1, *fast)
    expected = store_of(12, 8, torch.bfloat16)
    assert torch.equal(ops.fetch_slots(key, value, None, *lists, 8, int32(40, 41), 1, *expected)[1], copied.cpu())
    for a, b in zip(fast, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
