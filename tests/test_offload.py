"""Layers in files: the text and the logits of layers in memory, bit for bit, and no more memory than promised."""

from __future__ import annotations

import errno
import time

import pytest
import torch

import branchwise as bw
import tiny
from branchwise import kv
from branchwise.offload import MappedFiles, Offloaded, PageCache
from test_kv_policies import batch

POLICIES = {
    "quest": lambda **options: kv.Quest(64, page_size=8, recent=16, min_length=0, dense_layers=1, **options),
    "specontext": lambda **options: kv.SpeContext(budget=40, recent=12, min_length=0, **options),
    "sentencekv": lambda **options: kv.SentenceKV(
        range(40, 60), 32, 1.5, sinks=4, recent=12, window=8, longest=32, page_size=4, **options
    ),
}


@pytest.fixture
def ahead(monkeypatch):
    """Fetch on a thread, whatever the machine has."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(1000))


class Sessions:
    """A policy that remembers its sessions."""

    def __init__(self, policy):
        self.policy, self.sessions, self.most, self.rows = policy, [], 0, []

    def begin(self, model, store):
        session = self.policy.begin(model, store)
        self.sessions.append(session)
        inner = session.committed

        def committed(nodes, count):
            inner(nodes, count)
            self.most = max(self.most, store.num_bytes + session.num_bytes)

        session.committed = committed
        return session


def run(model, policy, max_new_tokens=60, rows=slice(None), **options):
    ids, mask = batch()
    with bw.sparse_kv(model, policy):
        return model.generate(
            ids[rows],
            attention_mask=mask[rows],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
            **options,
        )


def assert_same(a, b):
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("name", POLICIES)
def test_files_change_nothing(name, architecture, speculate, tmp_path):
    """Ragged rows that end at different steps, prompts that capacities outgrow; gemma3 has layers with windows."""
    model = tiny.model(architecture)
    inside, outside = Sessions(POLICIES[name]()), Sessions(POLICIES[name](offload=tmp_path))
    texts = []
    for policy in (inside, outside):
        options = {"custom_generate": bw.TreeSpeculation("trie", adaptive=False)} if speculate else {}
        texts.append(run(model, policy, eos_token_id=list(range(100, 106)), **options))
    assert_same(*texts)
    assert inside.sessions[0].offloaded is None
    session = outside.sessions[0]
    assert session.offloaded.caches and session.offloaded.copied_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_prompts_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("branchwise.forward._CHUNK", 20)
    model = tiny.model("llama")
    for make in POLICIES.values():
        assert_same(run(model, make()), run(model, make(offload=tmp_path)))


def test_mixed_and_late_placement(tmp_path):
    """Layers move while decoding, last ones first, as the text outgrows what memory is left."""
    model = tiny.model("llama")
    dense = run(model, POLICIES["specontext"](), max_new_tokens=250)
    counts = {}
    for memory in (0, 200_000, 350_000, 500_000, 10_000_000):
        policy = Sessions(POLICIES["specontext"](offload=tmp_path, memory=memory))
        assert_same(dense, run(model, policy, max_new_tokens=250))
        session = policy.sessions[0]
        moved = sorted(session.offloaded.caches)
        assert moved == list(range(3))[3 - len(moved) :]
        counts[memory] = len(moved)
        if memory:
            assert policy.most <= memory
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert counts[0] == 3 and counts[10_000_000] == 0 and len(set(counts.values())) > 2


@pytest.mark.parametrize("name", POLICIES)
def test_memory_does_not_grow_with_the_text(name, tmp_path):
    model = tiny.model("llama")
    inside, outside = Sessions(POLICIES[name]()), Sessions(POLICIES[name](offload=tmp_path))
    for policy in (inside, outside):
        run(model, policy, max_new_tokens=200)
    assert outside.most < inside.most


def test_bytes_in_memory(tmp_path):
    """Everything off-loaded: the retrieval head's keys and ``budget`` tokens per head, whatever the length."""
    model = tiny.model("llama")
    for new in (50, 300):
        policy = Sessions(POLICIES["specontext"](offload=tmp_path))
        run(model, policy, max_new_tokens=new)
        session = policy.sessions[0]
        model_ = session.memory_model()
        assert policy.most <= model_.needed(session.store.capacity, 3)
        assert session.offloaded.num_bytes <= model_.needed(0, 3)
        assert session.store.num_bytes == 0


def test_slow_and_late_fetches_change_nothing(tmp_path, monkeypatch, ahead):
    model = tiny.model("llama")
    wanted = run(model, POLICIES["specontext"](), max_new_tokens=12)
    fetch, delays = PageCache.fetch, iter(range(10**6))

    def slow(self, call, lists, unit, ahead=False):
        if ahead:
            time.sleep(next(delays) % 3 * 0.01)
        fetch(self, call, lists, unit, ahead)

    monkeypatch.setattr(PageCache, "fetch", slow)
    assert_same(wanted, run(model, POLICIES["specontext"](offload=tmp_path), max_new_tokens=12))
    assert next(delays) > 0, "nothing was fetched ahead"
    with torch.inference_mode():
        assert_same(wanted, run(model, POLICIES["specontext"](offload=tmp_path), max_new_tokens=12))


def test_errors_of_the_thread_reach_the_caller(tmp_path, monkeypatch, ahead):
    fetch = PageCache.fetch

    def broken(self, call, lists, unit, ahead=False):
        if ahead and call.layer == 2:
            raise OSError("the disk is gone")
        fetch(self, call, lists, unit, ahead)

    monkeypatch.setattr(PageCache, "fetch", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        run(tiny.model("llama"), POLICIES["specontext"](offload=tmp_path))


def test_a_forward_that_breaks_off_leaves_no_thread_behind(tmp_path, monkeypatch, ahead):
    model = tiny.model("llama")

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    closed = []
    close = Offloaded.close
    monkeypatch.setattr(Offloaded, "close", lambda self: (close(self), closed.append(self)))
    monkeypatch.setattr(Offloaded, "fetched", broken)
    with pytest.raises(KeyboardInterrupt):
        run(model, POLICIES["specontext"](offload=tmp_path))
    assert len(closed) == 1 and not closed[0]._fetches and closed[0]._thread._shutdown


def test_no_thread_where_no_core_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(torch.get_num_threads()))
    policy = Sessions(POLICIES["specontext"](offload=tmp_path))
    run(tiny.model("llama"), policy, max_new_tokens=3)
    assert policy.sessions[0].offloaded._thread is None


@pytest.mark.parametrize("memory", [0, 10_000, 123_456, 10**7])
def test_thresholds(memory):
    """The longest text for every number of layers in files, and not one token more."""
    model = kv.MemoryModel(layers=5, rows=3, kv_heads=2, head_dim=16, item_bytes=2, budget=7, head_bytes=66)
    limits = model.thresholds(memory)
    for i, slots in enumerate(limits):
        assert model.needed(slots, i) <= memory < model.needed(slots + 1, i)
    if limits[0] >= model.budget:
        assert limits == sorted(limits)
    for slots in (1, 10, 100, 1000):
        count = model.offloaded(slots, memory)
        assert count == 5 or model.needed(slots, count) <= memory
        assert count == 0 or model.needed(slots, count - 1) > memory


def test_refuses(tmp_path, monkeypatch):
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="offload must be a directory, got '/no/such/place'"):
        run(model, kv.SpeContext(budget=40, offload="/no/such/place"))
    with pytest.raises(ValueError, match="memory = 5 needs offload"):
        kv.SpeContext(memory=5)
    with pytest.raises(ValueError, match="memory must be at least 0, got -1"):
        kv.SpeContext(memory=-1, offload=tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        MappedFiles(tmp_path)(torch.zeros(1), (4, 5))
    assert list(tmp_path.iterdir()) == []
