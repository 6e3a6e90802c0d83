"""The case table of sparse_attention: the attention cases' inputs with lists, ranges and caches of every layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import attention_cases
from attention_cases import Case, Inputs
from branchwise.ops.sparse import ALL


@dataclass(frozen=True)
class Sparse:
    case: Case
    lists: str = ""  # "head", "row" (one list for all heads) or "token" (one per new token and head)
    unit: int = 1
    keep: float = 0.3  # part of the units that is listed
    segments: int = 0  # of ragged length; 0: units
    ranges: bool = False
    head_pages: bool = False  # pages per head, lengths per head where there are no ranges

    def __str__(self):
        options = {"unit": self.unit, "keep": self.keep, "seg": self.segments}
        flags = [name for name in ("ranges", "head_pages") if getattr(self, name)]
        return "-".join([str(self.case), self.lists, *(f"{k}{v}" for k, v in options.items() if v), *flags])


FEW, MANY = Case(T=1, Hq=8, Hkv=2, prefix=900, B=2), Case(T=7, Hq=9, Hkv=3, B=3, prefix=400)
CASES = [
    Sparse(FEW, "head"),
    Sparse(FEW, "head", unit=16),
    Sparse(FEW, "row", unit=7),
    Sparse(FEW, "head", keep=0.0),
    Sparse(FEW, "head", keep=1.0),
    Sparse(FEW, "head", unit=1000),
    Sparse(Case(T=1, Hq=4, Hkv=2, page_size=16, B=3, prefix=500), "head", unit=16),
    Sparse(Case(T=1, Hq=4, Hkv=2, page_size=5, B=3, prefix=500), "head", unit=8, ranges=True),
    Sparse(Case(T=1, Hq=4, Hkv=4, D=128, prefix=5000), "head", unit=16, keep=0.5),
    Sparse(MANY, "head"),
    Sparse(MANY, "row", unit=16),
    Sparse(MANY, "token", unit=16),
    Sparse(MANY, "token", unit=1, ranges=True),
    Sparse(MANY, "head", unit=3, ranges=True),
    Sparse(MANY, ranges=True),
    Sparse(MANY, "head", segments=20),
    Sparse(MANY, "token", segments=9, ranges=True),
    Sparse(Case(B=2, Hq=4, Hkv=2, T=2, prefix=900), "head", segments=300),
    Sparse(Case(T=40, Hq=6, Hkv=2, B=2, prefix=300, page_size=16, sinks=True, softcap=3.0), "token", unit=16),
    Sparse(Case(T=40, Hq=6, Hkv=2, B=2, prefix=300), ranges=True),
    Sparse(Case(T=40, Hq=6, Hkv=2, B=2, prefix=20), ranges=True),
    Sparse(Case(T=40, Hq=6, Hkv=2, B=2, prefix=0, tree=False), ranges=True),
    Sparse(Case(T=2, Hq=2, Hkv=2, B=2, prefix=90), ranges=True),
    Sparse(Case(T=5, Hq=4, Hkv=1, before=30, B=2), "token", unit=16),
    Sparse(Case(T=1, Hq=6, Hkv=3, B=2, page_size=16), "head", unit=16, head_pages=True),
    Sparse(Case(T=9, Hq=6, Hkv=3, B=2, page_size=8), "token", unit=5, head_pages=True),
    Sparse(Case(T=9, Hq=6, Hkv=3, B=2, page_size=8, prefix=200), ranges=True, head_pages=True),
    Sparse(Case(T=1, Hq=6, Hkv=3, B=2, page_size=8, prefix=200), ranges=True, head_pages=True),
    Sparse(Case(T=3, D=80, Hq=3, Hkv=1, prefix=70), "head", unit=4),
]


def make(sparse: Sparse, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Positional arguments query, caches, seq_lens; the rest as options."""
    inputs = attention_cases.make(sparse.case, dtype, seed)
    query, key, value, seq_lens, mask = inputs.args
    g = torch.Generator().manual_seed(seed + 1)
    B, T, Hkv = sparse.case.B, sparse.case.T, sparse.case.Hkv
    options = {k: v for k, v in inputs.options.items() if k != "window"} | {"tree_mask": mask}
    if sparse.head_pages:
        pages = key.shape[0] * Hkv
        key, value = (cache.reshape(pages, 1, *cache.shape[2:]) for cache in (key, value))
        table = options["page_table"]
        options["page_table"] = (table[:, None] * Hkv + torch.arange(Hkv, dtype=torch.int32)[:, None]).contiguous()
        if not sparse.ranges:
            seq_lens = (seq_lens[:, None] - torch.arange(Hkv, dtype=torch.int32) * 37).clamp(min=0).contiguous()
    if sparse.lists:
        Hs, Tl = (1 if sparse.lists == "row" else Hkv), (T if sparse.lists == "token" else 1)
        lengths = seq_lens[:, None].expand(B, Hkv) if seq_lens.dim() == 1 else seq_lens
        if sparse.segments:
            cuts = torch.rand(B, Hs, sparse.segments + 1, generator=g).sort(-1).values
            options["segment_offsets"] = (cuts * lengths[:, :Hs, None]).int()
        lists = [
            [
                torch.nonzero(torch.rand(units, generator=g) < sparse.keep).flatten()
                for h in range(Hs)
                for units in [sparse.segments or -(-int(lengths[b, h]) // sparse.unit)]
            ]
            for b in range(B)
            for _ in range(Tl)
        ]
        K = max([len(x) for row in lists for x in row] + [1])
        indices = torch.stack([torch.stack([torch.cat([x, x.new_full((K - len(x),), -1)]) for x in r]) for r in lists])
        counts = torch.tensor([[len(x) for x in row] for row in lists], dtype=torch.int32)
        shape = (B, Tl) if sparse.lists == "token" else (B,)
        options["indices"] = indices.int().view(*shape, Hs, K)
        options["counts"] = counts.view(*shape, Hs)
        options["unit"] = sparse.unit
    if sparse.ranges:
        options["sink_sizes"] = torch.tensor([4, 16, 0, 9], dtype=torch.int32)[:Hkv].clone()
        options["recent_sizes"] = torch.tensor([30, ALL, 100, 1], dtype=torch.int32)[:Hkv].clone()
    return Inputs((query, key, value, seq_lens), options)
