"""A round of ops in a CUDA graph: nothing waits for the device, and a replay reads new lengths and trees."""

import pytest
import torch

from branchwise import ops

ON_DEVICE = ops.CUDA_LOADED and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not ON_DEVICE, reason="needs a CUDA device and libbranchwise_cuda")

B, Hq, Hkv, T, D, S, V = 3, 8, 2, 9, 64, 1024, 5000


def draw(seed):
    """What changes between rounds: lengths, tree, new keys and values, queries, tokens, logits."""
    g = torch.Generator().manual_seed(seed)
    parents = torch.full((B, T), -1, dtype=torch.int32)
    for i in range(1, T):
        parents[:, i] = torch.randint(0, i, (B,), generator=g)
    logits = torch.randn(B, T, V, generator=g)
    tokens = torch.randint(0, V, (B, T), generator=g)
    best = logits.argmax(-1)
    for i in range(1, T):
        tokens[:, i] = best[torch.arange(B), parents[:, i].long()]
    key, value = torch.randn(2, B, Hkv, T, D, generator=g).bfloat16()
    query = torch.randn(B, Hq, T, D, generator=g).bfloat16()
    lens = torch.randint(0, S - T, (B,), generator=g, dtype=torch.int32)
    return [x.cuda() for x in (lens, parents, key, value, query, tokens, logits.bfloat16())]


def one_round(caches, lens, parents, key, value, query, tokens, logits):
    ops.append_kv(key, value, *caches, lens)
    mask, _, child, sibling = ops.build_tree(parents, lens)
    out, lse = ops.tree_attention(query, *caches, lens, mask)
    accepted, count, bonus = ops.verify_greedy(tokens, child, sibling, logits)
    return out, lse, accepted, count, bonus, ops.commit_kv(list(caches), accepted, count, lens)


def test_replays_equal_calls():
    caches = torch.randn(2, B, Hkv, S, D, device="cuda").bfloat16().unbind()
    inputs = draw(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one_round(caches, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_round(caches, *inputs)
    for seed in range(1, 6):
        for old, new in zip(inputs, draw(seed), strict=True):
            old.copy_(new)
        before = [c.clone() for c in caches]
        graph.replay()
        expected = one_round(before, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))
        assert int(captured[3].max()) > 1
