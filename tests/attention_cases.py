"""The case table of tree_attention: one entry per shape and option; it serves CPU and CUDA tests and the benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from branchwise import ops
from branchwise.attention import pack_mask


@dataclass(frozen=True)
class Case:
    B: int = 1
    Hq: int = 4
    Hkv: int = 2
    T: int = 5
    D: int = 64
    prefix: int = 300  # longest P; rows get different lengths up to it
    tree: bool = True  # False: causal
    before: int = 0  # nodes of the tree that lie in the cache already, before the T new ones
    page_size: int = 0  # 0: contiguous
    window: int = 0
    sinks: bool = False
    softcap: float = 0.0
    scale: float | None = None
    large: float = field(default=1.0)  # factor on the query, for saturated softmax
    blocks: bool = False  # nodes see some of those behind them, too, as those of a diffusion model's blocks do

    def __str__(self):
        name = f"B{self.B}-{self.Hq}/{self.Hkv}x{self.D}-T{self.T}-P{self.prefix}-{'tree' if self.tree else 'causal'}"
        options = {"before": self.before, "page": self.page_size, "win": self.window}
        options |= {"sinks": self.sinks, "cap": self.softcap, "blocks": self.blocks}
        return name + "".join(f"-{key}{value}" for key, value in options.items() if value)


CASES = [
    # plain decoding: few rows, one to four per KV head, and just above the few-row kernel
    Case(T=1, Hq=2, Hkv=2, tree=False),
    Case(T=1, Hq=4, Hkv=2),
    Case(T=1, Hq=9, Hkv=3, prefix=1000),
    Case(T=1, Hq=8, Hkv=2, D=128, B=3),
    Case(T=1, Hq=10, Hkv=2, D=128, B=3),
    Case(T=2, Hq=2, Hkv=2, window=40),
    Case(T=3, Hq=1, Hkv=1, softcap=4.0, sinks=True, page_size=5),
    # every count of rows up to a vector's lanes, on every level, and head dims with part of a chunk
    *[Case(T=1, Hq=rows, Hkv=1, D=80, prefix=150 + rows) for rows in range(1, 18)],
    Case(T=5, Hq=3, Hkv=1, D=33, B=2, window=20, sinks=True, softcap=4.0, page_size=5),
    Case(T=3, Hq=4, Hkv=1, D=128, prefix=600, scale=-0.1),
    Case(T=1, Hq=6, Hkv=1, D=48, prefix=257, page_size=6, B=2),
    Case(T=1, Hq=5, Hkv=1, D=33, prefix=70),
    Case(T=4, Hq=2, Hkv=1, D=256, B=2, window=20, sinks=True),
    Case(T=4, Hq=2, Hkv=1, D=1, prefix=90),
    # trees of every size around vector, word and tile borders
    Case(T=7, Hq=7, Hkv=1, B=2),
    Case(T=16, Hq=9, Hkv=3, B=4, prefix=700),
    Case(T=63, B=2),
    Case(T=64, Hq=8, Hkv=2),
    Case(T=65, B=2, prefix=64),
    Case(T=130, Hq=6, Hkv=3, B=2, prefix=70),
    Case(T=400, Hq=4, Hkv=1, D=32, prefix=33),
    Case(T=1024, Hq=2, Hkv=1, D=32, prefix=128),
    # head dims: smallest, odd sizes, largest
    Case(D=32),
    Case(D=36, B=2),
    Case(D=35, T=20),
    Case(D=6, T=20),
    Case(D=80, T=12),
    Case(D=96, T=1),
    Case(D=100, T=1, Hq=3, Hkv=1),
    Case(D=112, Hq=3, Hkv=3),
    Case(D=256, Hq=4, Hkv=1, T=20),
    Case(D=512, Hq=2, Hkv=1, T=3),
    # no prefix, a prefix of one, and prompts
    Case(prefix=0, T=70, tree=False),
    Case(prefix=1, T=9, B=3),
    Case(prefix=0, T=500, Hq=4, Hkv=2, tree=False),
    # options, alone and together
    Case(window=17, T=40, B=2),
    Case(window=1, T=20),
    Case(window=500, T=30),
    Case(window=90, T=500, prefix=300, tree=False, B=2),
    Case(window=1, T=260, prefix=0, tree=False),
    Case(window=64, T=1, prefix=2000, B=2),
    Case(window=64, T=1, Hq=4, Hkv=4, prefix=500, tree=False),
    Case(softcap=3.0, T=33),
    Case(sinks=True, T=33, B=2),
    Case(scale=1.0, T=10),
    Case(scale=-0.2, T=10, B=2),
    Case(scale=0.0, T=10),
    Case(scale=-0.2, T=1),
    Case(scale=0.0, T=1),
    Case(page_size=16, T=30, B=3),
    Case(page_size=1, T=6, B=2),
    Case(page_size=7, T=70, B=2, window=50, sinks=True, softcap=5.0),
    # trees that grow: the queries are the last nodes
    Case(T=1, before=1, Hq=2, Hkv=2),
    Case(T=1, before=70, Hq=8, Hkv=1, B=2, window=30),
    Case(T=8, before=25, B=3, prefix=100),
    Case(T=8, before=120, Hq=9, Hkv=3, page_size=16, sinks=True),
    Case(T=40, before=64, B=2, prefix=0),
    Case(T=200, before=300, Hq=4, Hkv=1, window=50, prefix=90),
    # blocks: nodes that see each other both ways
    *[Case(T=T, Hq=6, Hkv=2, B=2, prefix=70, blocks=True) for T in (1, 2, 5, 64, 65, 200)],
    Case(T=8, Hq=2, Hkv=2, D=128, B=3, prefix=700, blocks=True, page_size=16),
    Case(T=500, Hq=4, Hkv=1, B=2, prefix=0, blocks=True, sinks=True, softcap=5.0),
    Case(T=30, before=50, Hq=4, Hkv=1, prefix=33, blocks=True),
    # few heads and a short row: smaller blocks
    Case(T=64, Hq=4, Hkv=1, D=256, prefix=128),
    Case(T=256, Hq=3, Hkv=1, prefix=0, tree=False),
    Case(large=100.0, T=20),
    Case(large=100.0, T=1, softcap=20.0),
]


@dataclass
class Inputs:
    args: tuple
    options: dict


def random_parents(B: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """Random trees; a few trailing nodes of every other row are padding."""
    parents = torch.full((B, T), -1, dtype=torch.int32)
    for b in range(B):
        nodes = T - (b % 2) * (T // 5)
        for i in range(1, nodes):
            low = max(0, i - 6) if b % 3 else 0
            parents[b, i] = int(torch.randint(low, i, (1,), generator=generator))
    return parents


def block_mask(B: int, N: int, generator: torch.Generator) -> torch.Tensor:
    """Every node sees itself and others at random; the last block of every other row sees all of itself."""
    sees = torch.rand(B, N, N, generator=generator) < 0.4
    sees |= torch.eye(N, dtype=torch.bool)
    sees[::2, -(-N // 3) :, -(-N // 3) :] = True
    return pack_mask(sees)


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    B, Hq, Hkv, T, D = case.B, case.Hq, case.Hkv, case.T, case.D
    seq_lens = torch.randint(case.prefix // 2, case.prefix + 1, (B,), generator=g, dtype=torch.int32)
    seq_lens[0] = case.prefix
    query = (torch.randn(B, T, Hq, D, generator=g) * case.large).to(dtype).transpose(1, 2)  # as models pass it
    N = case.before + T
    S = case.prefix + N
    page_table = None
    if case.page_size:
        per_row = -(-S // case.page_size)
        shape = (B * per_row + 1, Hkv, case.page_size, D)  # one page stays unused
        page_table = torch.randperm(B * per_row, generator=g).int().view(B, per_row)
    else:
        shape = (B, Hkv, S + 3, D)
    key, value = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    mask = ops.build_tree(random_parents(B, N, g), seq_lens)[0] if case.tree else None
    if case.blocks:
        mask = block_mask(B, N, g)
    options = {
        "page_table": page_table,
        "scale": case.scale,
        "window": case.window,
        "sinks": torch.randn(Hq, generator=g) if case.sinks else None,
        "softcap": case.softcap,
    }
    return Inputs((query, key, value, seq_lens, mask), options)


def in_e4m3(inputs):
    """The same inputs over caches in e4m3, with a factor per head."""
    query, key, value, *rest = inputs.args
    table = inputs.options.get("page_table")
    heads = table.shape[1] if table is not None and table.dim() == 3 else key.shape[1]
    scales = {name: torch.linspace(0.01, 0.03, heads) for name in ("key_scale", "value_scale")}
    inputs.args = query, *((cache.float() / 0.02).to(torch.float8_e4m3fn) for cache in (key, value)), *rest
    inputs.options |= scales
    return inputs
