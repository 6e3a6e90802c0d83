"""Cases of path_attention, and what its bits are held to: those of a token behind a cache that holds its path."""

from __future__ import annotations

import torch

import attention_cases
from attention_cases import Case
from branchwise.ops.attention import gather_row, unpack_mask

# Prefixes around the borders of tiles (64 slots) and stretches (256), and paths that cross them.
TREES = [
    Case(T=12, Hq=9, Hkv=3, prefix=0, B=2),
    Case(T=20, Hq=4, Hkv=1, prefix=60, B=3),
    Case(T=9, Hq=8, Hkv=2, D=128, prefix=64),
    Case(T=24, Hq=2, Hkv=2, D=36, prefix=255, B=2, page_size=16),
    Case(T=70, Hq=9, Hkv=3, prefix=256, B=2),
    Case(T=33, Hq=4, Hkv=2, prefix=700, window=40, sinks=True),
    Case(T=18, Hq=4, Hkv=2, prefix=600, window=500, softcap=5.0, scale=-0.3, page_size=7, B=2),
    Case(T=5, Hq=71, Hkv=1, D=33, prefix=300),
    Case(T=16, before=9, Hq=6, Hkv=2, prefix=250, B=2),
    Case(T=12, Hq=4, Hkv=2, prefix=1530, B=2),
    Case(T=12, Hq=4, Hkv=2, prefix=2040, window=900),
]
CHAIN = Case(T=300, Hq=4, Hkv=2, prefix=450, tree=False, B=2)


def committed(inputs, b, node):
    """The call in which ``node`` of row b is the only new token, behind a cache that holds its ancestors in order."""
    query, key, value, seq_lens, mask = inputs.args
    N = query.shape[2] if mask is None else mask.shape[1]
    P, first = int(seq_lens[b]), N - query.shape[2]
    path = torch.arange(node + 1) if mask is None else unpack_mask(mask[b], N)[node].nonzero()[:, 0]
    table = inputs.options["page_table"]
    rows = [gather_row(cache, b, P + N, table) for cache in (key, value)]
    rows = [torch.cat([row[:, :P], row[:, P + path]], 1)[None] for row in rows]
    lens = torch.tensor([P + len(path) - 1], dtype=torch.int32)
    return (query[b : b + 1, :, node - first : node - first + 1], *rows, lens), {**inputs.options, "page_table": None}


def same_as_committed(op, inputs, nodes=None):
    query, mask = inputs.args[0], inputs.args[4]
    B, _, T, _ = query.shape
    before = 0 if mask is None else mask.shape[1] - T
    out, lse = op(*inputs.args, **inputs.options)
    same = True
    for b in range(B):
        for t in nodes or range(T):
            args, options = committed(inputs, b, before + t)
            alone, alone_lse = op(*args, **options)
            same &= torch.equal(alone[0, :, 0], out[b, :, t]) and torch.equal(alone_lse[0, :, 0], lse[b, :, t])
    return same


def scattered(dtype):
    """Nodes that see any earlier ones."""
    inputs = attention_cases.make(Case(T=90, B=2, Hq=6, Hkv=2, prefix=200), dtype)
    g = torch.Generator().manual_seed(3)
    sees = (torch.rand(2, 90, 90, generator=g) < 0.3).tril() | torch.eye(90, dtype=torch.bool)
    inputs.args = (*inputs.args[:4], attention_cases.pack_mask(sees))
    return inputs
