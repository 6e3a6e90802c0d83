"""KVStore: growth, ragged rows, commit, row selection."""

import pytest
import torch

from branchwise import KVStore


def append(store, T, layers=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    store.reserve(T)
    B = len(store.seq_lens)
    new = [(torch.randn(B, 2, T, 32, generator=g), torch.randn(B, 2, T, 32, generator=g)) for _ in range(layers)]
    for layer, (key, value) in enumerate(new):
        keys, values = store.update(key, value, layer)
        assert keys is store.layers[layer].keys and values.shape == (B, 2, store.capacity, 32)
    return new


def counts(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_ragged_rows_keep_their_tokens_through_growth():
    store = KVStore(3, capacity=10)
    assert store.capacity == 64
    texts = [[], [], []]
    for step, kept in enumerate([(50, 20, 1), (1, 2, 3), (40, 0, 30), (100, 5, 7)]):
        new = append(store, max(kept), seed=step)
        for row, n in enumerate(kept):
            texts[row].append(new[1][0][row, :, :n])
        store.advance(counts(*kept))
    assert store.seq_lens.tolist() == [191, 27, 41] and store.get_seq_length() == 191
    for row in range(3):
        assert torch.equal(store.row(1, row)[0], torch.cat(texts[row], dim=1))


def test_capacity_grows_by_half_so_appends_stay_cheap():
    store, growths = KVStore(1), 0
    for _ in range(2000):
        before = store.capacity
        append(store, 1, layers=1)
        store.advance(counts(1))
        growths += store.capacity != before
    assert growths <= 10


def test_num_bytes_counts_the_slots():
    store = KVStore(2, capacity=64)
    assert store.num_bytes == 0
    append(store, 3)
    assert store.num_bytes == 2 * 2 * (2 * 2 * 64 * 32) * 4


def test_commit_keeps_a_path_and_forgets_the_rest():
    store = KVStore(2)
    append(store, 5)
    store.advance(counts(5, 3))
    new = append(store, 6, seed=1)
    path = torch.tensor([[0, 2, 5], [0, -1, -1]], dtype=torch.int32)
    store.commit(path, counts(3, 1))
    assert store.seq_lens.tolist() == [8, 4]
    assert torch.equal(store.row(0, 0)[0][:, 5:], new[0][0][0][:, [0, 2, 5]])
    assert torch.equal(store.row(1, 1)[1][:, 3:], new[1][1][1][:, [0]])


def test_select_rows():
    store = KVStore(3)
    new = append(store, 4)
    store.advance(counts(4, 2, 3))
    store.select_rows([2, 0])
    assert store.seq_lens.tolist() == [3, 4]
    assert torch.equal(store.row(0, 0)[0], new[0][0][2][:, :3])
    assert torch.equal(store.row(0, 1)[0], new[0][0][0][:, :4])


def test_forgetting_to_reserve_is_refused():
    store = KVStore(1, capacity=64)
    append(store, 60)
    store.advance(counts(60))
    with pytest.raises(RuntimeError, match="seq_lens\\[0\\] = 60 plus 5 new slots"):
        store.update(torch.zeros(1, 2, 5, 32), torch.zeros(1, 2, 5, 32), 0)
    with pytest.raises(ValueError, match="batch_size and capacity must be at least 1, got 0 and 64"):
        KVStore(0)
