"""From scores to the ascending lists that sparse_attention and evict_kv take."""

import math

import torch
from torch import Tensor


def select_pages(
    scores: Tensor, num_pages: Tensor, num_scored: Tensor, budget: int | Tensor, *, num_sinks: int = 0
) -> tuple[Tensor, Tensor]:
    """The best of the scored pages of every list, and the newest pages, which are always in.

    Of the pages below ``num_scored``, ``budget`` are taken: the first ``num_sinks`` of them in any case, and then the
    best ones, ties to the lower page. Those from ``num_scored`` to ``num_pages - 1`` are recent and come on top. NaN
    counts as the smallest score. With a page per token, pages are slots.

    Args:
        scores: f32[B, L, Hs, N], contiguous; L is 1 or the tokens that get lists of their own, Hs 1 or Hkv.
        num_pages: i32[B, L], pages there are.
        num_scored: i32[B, L], how many of them compete; those behind are recent.
        budget: scored pages per list, one number or i32[B, L, Hs].
        num_sinks: first pages that are always taken.

    Returns:
        ``indices`` i32[B, L, Hs, K], ascending, -1 behind the ends, and ``counts`` i32[B, L, Hs].

    Raises:
        RuntimeError: shapes, dtypes or counts disagree.

    Source: card sparse-kernel-interface, family D.
    """
    if not isinstance(budget, Tensor):
        budget = torch.full(scores.shape[:3], budget, dtype=torch.int32)
    return torch.ops.branchwise.select_pages.default(scores, num_pages, num_scored, budget, num_sinks)


@torch.library.register_fake("branchwise::select_pages")
def _(scores, num_pages, num_scored, budgets, num_sinks=0):
    size = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty((*scores.shape[:3], size), dtype=torch.int32), scores.new_empty(
        scores.shape[:3], dtype=torch.int32
    )


def select_pages_reference(scores, num_pages, num_scored, budget, *, num_sinks=0) -> tuple[Tensor, Tensor]:
    """The definition of :func:`select_pages`, list by list."""
    B, L, H, _ = scores.shape
    lists = []
    for b in range(B):
        for t in range(L):
            pages, scored = int(num_pages[b, t]), int(num_scored[b, t])
            sinks = min(num_sinks, scored)
            for h in range(H):
                row = scores[b, t, h].nan_to_num(-math.inf, math.inf, -math.inf).tolist()
                rest = sorted(range(sinks, scored), key=lambda n: (-row[n], n))
                rest = rest[: max(0, int(budget[b, t, h] if isinstance(budget, Tensor) else budget) - sinks)]
                lists.append(sorted([*range(sinks), *rest, *range(scored, pages)]))
    return _pad(lists, (B, L, H))


def select_slots(scores: Tensor, segment_offsets: Tensor, num_segments: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Slots of the best segments, in order of score, until a budget of slots is used up; the last one is cut short.

    Args:
        scores: f32[B, L, Hs, S], contiguous; -inf or NaN keeps a segment out. Ties to the lower segment.
        segment_offsets: i32[B, Hs, S + 1]; segment i is slots ``offsets[i]`` to ``offsets[i + 1] - 1``.
        num_segments: i32[B, L], segments that may be taken.
        budget: slots per list.

    Returns:
        ``indices`` i32[B, L, Hs, K], ascending slots, -1 behind the ends, and ``counts`` i32[B, L, Hs].

    Raises:
        RuntimeError: shapes or dtypes disagree, or offsets do not ascend.

    Source: card sparse-kernel-interface, family D; sentencekv.
    """
    return torch.ops.branchwise.select_slots.default(scores, segment_offsets, num_segments, budget)


@torch.library.register_fake("branchwise::select_slots")
def _(scores, segment_offsets, num_segments, budget):
    size = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty((*scores.shape[:3], size), dtype=torch.int32), scores.new_empty(
        scores.shape[:3], dtype=torch.int32
    )


def select_slots_reference(scores, segment_offsets, num_segments, budget) -> tuple[Tensor, Tensor]:
    """The definition of :func:`select_slots`, list by list."""
    B, L, H, _ = scores.shape
    lists = []
    for b in range(B):
        for t in range(L):
            for h in range(H):
                row = scores[b, t, h].nan_to_num(-math.inf, math.inf, -math.inf).tolist()
                slots: list[int] = []
                for n in sorted(range(int(num_segments[b, t])), key=lambda n: (-row[n], n)):
                    if row[n] == -math.inf:
                        break
                    first, last = segment_offsets[b, h, n : n + 2].tolist()
                    slots += list(range(first, last))[: budget - len(slots)]
                lists.append(sorted(slots))
    return _pad(lists, (B, L, H))


def _pad(lists: list[list[int]], shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    K = max([len(one) for one in lists] + [1])
    indices = torch.tensor([one + [-1] * (K - len(one)) for one in lists], dtype=torch.int32)
    counts = torch.tensor([len(one) for one in lists], dtype=torch.int32)
    return indices.view(*shape, K), counts.view(shape)
