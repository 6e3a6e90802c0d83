"""PagedLayer: pages per head, eviction, holes, growth, and what is given back."""

import numpy as np
import pytest
import torch

from branchwise import KVStore
from branchwise.pages import PagedLayer

B, H, D = 2, 3, 8


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make(S=64, page_size=4, seed=0):
    """A layer with 40 and 25 slots, and what is in them."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(B, H, S, D, generator=g) for _ in range(2))
    lens = int32([40] * H, [25] * H)
    return PagedLayer.from_slots(keys, values, lens, page_size), keys, values


def assert_holds(layer, texts):
    """``texts[b][h]``: keys [n, D]."""
    for b in range(len(texts)):
        for h in range(H):
            assert torch.equal(layer.row(b, h)[0], texts[b][h])


def test_only_used_pages_are_kept():
    layer, keys, _ = make()
    assert len(layer.keys) == H * (10 + 7)
    assert layer.num_bytes == layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
    assert_holds(layer, [[keys[b, h, :n] for h in range(H)] for b, n in enumerate((40, 25))])


def test_a_life_of_appends_commits_evictions_and_leaving_rows():
    layer, keys, _ = make()
    g = torch.Generator().manual_seed(1)
    texts = [[keys[b, h, :n] for h in range(H)] for b, n in enumerate((40, 25))]
    for _ in range(30):
        T = int(torch.randint(1, 9, (), generator=g))
        layer.reserve(T)
        new = torch.randn(len(texts), H, T, D, generator=g)
        layer.update(new, new)
        nodes = torch.arange(T, dtype=torch.int32).expand(len(texts), T).contiguous()
        count = torch.randint(0, T + 1, (len(texts),), generator=g, dtype=torch.int32)
        layer.commit(nodes, count)
        texts = [[torch.cat([old, new[b, h, : count[b]]]) for h, old in enumerate(row)] for b, row in enumerate(texts)]
        if int(torch.randint(0, 3, (), generator=g)) == 0:
            kept = [
                [torch.rand(len(old), generator=g).topk(len(old) // 2).indices.sort().values for old in r]
                for r in texts
            ]
            K = max(len(k) for row in kept for k in row)
            pad = torch.stack([torch.stack([torch.cat([k, k.new_full((K - len(k),), -1)]) for k in r]) for r in kept])
            layer.evict(pad.int(), torch.tensor([[len(k) for k in row] for row in kept], dtype=torch.int32))
            texts = [[old[k] for old, k in zip(*pair, strict=True)] for pair in zip(texts, kept, strict=True)]
        assert_holds(layer, texts)
        used = layer.page_table[layer.page_table >= 0].tolist()
        assert len(set(used)) == len(used) and set(used).isdisjoint(layer._free)
        assert sorted(used + layer._free) == list(range(len(layer.keys)))
    layer.select_rows([1])
    assert_holds(layer, [texts[1]])
    assert len(layer.keys) == sum(-(-len(text) // 4) for text in texts[1])


def test_holes_free_whole_pages_and_leave_the_other_slots_where_they_are():
    layer, keys, _ = make()
    begin, end = np.full((B, H), 6, np.int32), np.array([[30, 6, 40], [6, 24, 6]], np.int32)
    layer.release(begin, end)
    held = (layer.page_table >= 0).sum(-1)
    assert held.tolist() == [[10 - 5, 10, 10 - 8], [7, 7 - 4, 7]]
    assert layer.page_table[0, 0, :10].ge(0).tolist() == [True, True, *[False] * 5, True, True, True]
    layer.reserve(3)
    assert layer.page_table[0, 0, :11].ge(0).tolist() == [True, True, *[False] * 5, True, True, True, True]
    assert torch.equal(layer.keys[layer.page_table[0, 0, 8], 0], keys[0, 0, 32:36])
    packed = PagedLayer.from_slots(keys, keys, int32([40] * H, [25] * H), 4, (begin, end))
    assert len(packed.keys) == int((packed.page_table >= 0).sum()) < H * 17


def test_pools_grow_by_an_eighth():
    layer, _, _ = make()
    sizes = set()
    for _ in range(400):
        layer.reserve(1)
        layer.advance(int32(1, 1))
        sizes.add(len(layer.keys))
    assert len(sizes) < 30


def test_a_stores_layers_may_hold_less_than_its_positions():
    store = KVStore(2, 64)
    g = torch.Generator().manual_seed(0)
    store.reserve(30)
    for layer in range(2):
        store.update(torch.randn(2, H, 30, D, generator=g), torch.randn(2, H, 30, D, generator=g), layer)
    store.advance(int32(30, 20))
    before, bytes_before = store.layers[1].keys.clone(), store.num_bytes
    keep = torch.arange(0, 20, 2, dtype=torch.int32).expand(2, 1, 10).contiguous()
    store.evict(1, keep, int32([10], [8]), page_size=16)
    assert store.num_bytes < bytes_before and store.seq_lens.tolist() == [30, 20]
    assert store.layers[1].lens.tolist() == [[10] * H, [8] * H] and store.layers[0].lens.tolist() == [30, 20]
    assert torch.equal(store.layers[1].row(1, 2)[0], before[1, 2, 0:16:2])
    store.reserve(5)
    for layer in range(2):
        store.update(torch.zeros(2, H, 5, D), torch.zeros(2, H, 5, D), layer)
    store.commit(int32([0, 2, -1], [1, -1, -1]), int32(2, 1))
    assert store.seq_lens.tolist() == [32, 21] and store.layers[1].lens.tolist() == [[12] * H, [9] * H]
    store.select_rows([1])
    assert store.layers[1].lens.tolist() == [[9] * H] and store.layers[1].num_bytes == 2 * H * 16 * D * 4
    store.clear()
    assert store.num_bytes == 0 and store.seq_lens.tolist() == [0]


def test_refuses_pages_that_are_missing():
    layer, _, _ = make()
    new = torch.zeros(B, H, 4, D)
    with pytest.raises(RuntimeError, match="append_kv: "):
        layer.update(new, new)  # without reserve
