"""KVTree under real models: after any operations a branch holds what a fresh prefill holds, bits do not depend on the
other branches, and pages and bytes are what unique texts need."""

import random

import pytest
import torch

import tiny
from branchwise.attention import use_attention
from branchwise.cache import KVStore
from branchwise.forward import StoredModel
from branchwise.kv_tree import KVTree

ARCHITECTURES = ["llama", "gemma2", "gemma3", "gemma4", "gpt_neox", "gpt_oss", "qwen3_moe"]


class Grove:
    """A tree, its model, and beside it the tokens of every branch."""

    def __init__(self, name, page_size=4, dtype=torch.float32):
        self.model = tiny.model(name, dtype)
        self.tree = KVTree(page_size)
        self.stored = StoredModel(self.model, self.tree, deterministic=True)
        self.texts = {}

    def root(self):
        self.texts[branch := self.tree.root()] = []
        return branch

    def append(self, branches, rows):
        """Ragged; returns the logits behind every branch."""
        self.tree.select(branches)
        with torch.no_grad(), use_attention(self.model):
            logits = self.stored.extend([torch.tensor(row) for row in rows])
        for branch, row in zip(branches, rows, strict=True):
            self.texts[branch] = self.texts[branch] + list(row)
        self.tree.select([])
        return logits

    def fork(self, branch, n):
        new = self.tree.fork(branch, n)
        self.texts |= {b: self.texts[branch] for b in new}
        return new

    def prune(self, branches):
        self.tree.prune(branches)
        for branch in branches:
            self.texts.pop(branch, None)

    def resample(self, branches, ancestors):
        old = [self.texts[b] for b in branches]
        new = self.tree.resample(branches, ancestors)
        for branch in branches:
            del self.texts[branch]
        self.texts |= {b: old[a] for b, a in zip(new, ancestors, strict=True)}
        return new

    def truncate(self, branch, n):
        self.tree.truncate(branch, n)
        self.texts[branch] = self.texts[branch][:n]

    def check(self, atol=1e-5):
        """Every branch against the KV of its tokens run afresh."""
        for branch, text in self.texts.items():
            assert self.tree.length(branch) == len(text)
            if not text:
                continue
            fresh = StoredModel(self.model, KVStore(1))
            with torch.no_grad(), use_attention(self.model):
                fresh.extend([torch.tensor(text)])
            for i, layer in enumerate(fresh.store.layers):
                if not layer.is_initialized:
                    continue
                for ours, theirs in zip(self.tree.branch(i, branch), fresh.store.row(i, 0), strict=True):
                    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)

    def pages_needed(self):
        """At least: unique page-sized stretches, by what they and all before them hold."""
        size = self.tree.page_size
        return len({(tuple(t[: (i + 1) * size])) for t in self.texts.values() for i in range(-(-len(t) // size))})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_operations_equal_a_fresh_prefill(name):
    """150 operations for each of seven architectures; more than 1000 in all."""
    chance = random.Random(name)
    grove = Grove(name)
    grove.root()
    for step in range(150):
        branches = list(grove.texts)
        branch = chance.choice(branches)
        kind = chance.choices("fptras", [3, 2, 2, 1, 8, 0.3])[0]
        if kind == "f" and len(branches) < 10:
            grove.fork(branch, chance.randrange(1, 4))
        elif kind == "p" and len(branches) > 3:
            grove.prune(chance.sample(branches, 2))
        elif kind == "t":
            grove.truncate(branch, chance.randrange(len(grove.texts[branch]) + 1))
        elif kind == "r":
            some = chance.sample(branches, min(len(branches), 4))
            grove.resample(some, [chance.randrange(len(some)) for _ in some])
        elif kind == "a":
            some = [b for b in chance.sample(branches, min(len(branches), 3)) if len(grove.texts[b]) < 40]
            rows = [[chance.randrange(3, 100) for _ in range(chance.randrange(1, 7))] for _ in some]
            if some:
                grove.append(some, rows)
        elif kind == "s":
            grove.tree.shrink()
        if step % 30 == 29:
            grove.check()
    grove.check()
    grove.prune(list(grove.texts))
    assert grove.tree.num_pages == 0
    grove.tree.shrink()
    assert grove.tree.num_bytes == 0


def run_branches(dtype, others, name="llama", prefix=700):
    """Logits of a branch with a tail of 40 tokens, decoded beside ``others`` more that were forked at other places."""
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 100, (prefix,), generator=g).tolist()
    tail = torch.randint(3, 100, (40,), generator=g).tolist()
    grove = Grove(name, 16, dtype)
    root = grove.root()
    grove.append([root], [prompt])
    branch = grove.fork(root, 1)[0]
    rest = [grove.fork(root, 1)[0] for _ in range(others)]
    for i, other in enumerate(rest):
        grove.truncate(other, prefix - 37 * i)
    logits = []
    for i, token in enumerate(tail):
        # Its place among the rows changes, too.
        rows = [*rest]
        rows.insert(i % (others + 1), branch)
        out = grove.append(rows, [[token if b == branch else 3 + i] for b in rows])
        logits.append(out[i % (others + 1), 0].clone())
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "gpt_neox"])
def test_bits_do_not_depend_on_other_branches(name, dtype):
    alone = run_branches(dtype, 0, name)
    for others in (1, 2, 4, 7):
        assert torch.equal(run_branches(dtype, others, name), alone)


def test_sixteen_branches_store_the_prefix_once():
    grove = Grove("llama", 16)
    root = grove.root()
    grove.append([root], [[5] * 1000])
    before = grove.tree.used_bytes
    branches = grove.fork(root, 16)
    grove.prune([root])
    assert grove.tree.used_bytes == before
    for i in range(40):
        grove.append(branches, [[3 + b % 50 + i] for b in range(16)])
    tokens = 1000 + 16 * 40
    config = grove.model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert grove.tree.num_pages == grove.pages_needed() == 62 + 16 * 3  # 8 slots are copied into each branch's own
    assert grove.tree.used_bytes == grove.tree.num_pages * 16 * per_token <= per_token * tokens * 1.10
    grove.tree.shrink()
    assert grove.tree.num_bytes == grove.tree.used_bytes
    grove.check()


def test_rows_in_hand_are_not_pulled_away():
    grove = Grove("llama")
    a, b = grove.root(), grove.root()
    grove.tree.select([a])
    for call in (
        lambda: grove.tree.prune([b, a]),
        lambda: grove.tree.resample([a, b], [0, 0]),
        lambda: grove.tree.truncate(a, 0),
    ):
        with pytest.raises(ValueError, match="in hand; select others first"):
            call()
    assert grove.tree.pool.branches == [a, b]
    with pytest.raises(ValueError, match=r"branches must differ, got \[0, 0\]"):
        grove.tree.select([a, a])
    with pytest.raises(ValueError, match="length must be at most 0, what the branch holds, got 3"):
        grove.tree.truncate(b, 3)
    with pytest.raises(ValueError, match="page_size must divide 256, got 24"):
        KVTree(24)


def test_what_rows_alone_can_do_is_refused():
    tree = KVTree()
    for call in (tree.evict, tree.make_pages, tree.move, tree.start_empty, tree.copy_rows, tree.row):
        with pytest.raises(TypeError, match="pages belong to several branches"):
            call(0, 0)


def test_export_is_what_other_kernels_read():
    grove = Grove("llama", 16)
    root = grove.root()
    grove.append([root], [list(range(3, 53))])
    fork = grove.fork(root, 1)[0]
    grove.append([fork], [[7, 8, 9]])
    table, lengths = grove.tree.export([root, fork])
    assert lengths.tolist() == [50, 53] and table[0, :3].tolist() == table[1, :3].tolist()
    assert table[0, 3] != table[1, 3]  # the last page was copied
    keys = grove.tree.layers[0].keys
    flat = keys[table[1].long()].transpose(0, 1).flatten(1, 2)[:, :53]
    assert torch.equal(flat, grove.tree.branch(0, fork)[0])
