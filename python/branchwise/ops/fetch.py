"""Slots of a slower store, held in a faster one as far as they are attended to."""

import torch
from torch import Tensor

from ._load import refuse_grad
from .kv import head_slot


def fetch_slots(
    key_source: Tensor,
    value_source: Tensor,
    source_table: Tensor | None,
    indices: Tensor,
    counts: Tensor,
    unit: int,
    seq_lens: Tensor,
    new_tokens: int,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    owners: Tensor,
) -> tuple[Tensor, Tensor]:
    """Brings the pages that lists name from a slower store to a faster one, as far as they are not there yet.

    Afterwards the faster store holds, for every row and KV head, the listed pages and those of the slots from the last
    committed page on, so that :func:`sparse_attention` with the same lists and ``page_table`` reads what it would read
    in the source. Listed complete pages that are there already stay where they are; pages that are not listed make
    room; pages that are not complete, whose slots may still change, are copied at every call.

    Args:
        key_source, value_source, source_table: contiguous [B, Hkv, S, D] without a table or paged, in memory or mapped
            from a file.
        indices, counts, unit: lists as :func:`sparse_attention` takes them, i32[B, Hs, K] or i32[B, T, Hs, K] with
            their counts; ``unit`` slots per entry divide the page size of the faster store.
        seq_lens: i32[B] or i32[B, Hkv], committed slots.
        new_tokens: uncommitted slots behind them.
        key_cache, value_cache: [B * Hkv * C, 1, page_size, D]; head h of row b owns C pages from (b * Hkv + h) * C on.
            Mutated.
        page_table: i32[B, Hkv, N] of the faster store, at first -1. Mutated.
        owners: i32[B, Hkv, C], the page that each of a head's C holds, -2 - page for one that was not complete, at
            first -1. Mutated.

    Returns:
        ``needed`` i32[B, Hkv], pages that the lists and the new tokens need, and ``copied`` i32[B, Hkv]. Where a head
        needs more than C, nothing is changed in any.

    Raises:
        RuntimeError: shapes or dtypes disagree, a list leaves the source, or a page of the source is missing; nothing
            is changed then.

    One thread. Source: card sparse-kernel-interface, family H (kv_fetch); card specontext, steps 5 to 7.
    """
    refuse_grad("fetch_slots", key_source, value_source, key_cache, value_cache)
    return torch.ops.branchwise.fetch_slots.default(
        key_source,
        value_source,
        source_table,
        indices,
        counts,
        unit,
        seq_lens,
        new_tokens,
        key_cache,
        value_cache,
        page_table,
        owners,
    )


@torch.library.register_fake("branchwise::fetch_slots")
def _(
    key_source,
    value_source,
    source_table,
    indices,
    counts,
    unit,
    seq_lens,
    new_tokens,
    key_cache,
    value_cache,
    page_table,
    owners,
):
    return owners.new_empty(owners.shape[:2]), owners.new_empty(owners.shape[:2])


def fetch_slots_reference(
    key_source,
    value_source,
    source_table,
    indices,
    counts,
    unit,
    seq_lens,
    new_tokens,
    key_cache,
    value_cache,
    page_table,
    owners,
):
    """The definition of :func:`fetch_slots`, with sets."""
    B, Hkv, C = owners.shape
    size = key_cache.shape[2]
    lists = indices if indices.dim() == 4 else indices[:, None]
    sizes = counts if counts.dim() == 3 else counts[:, None]
    lens = seq_lens if seq_lens.dim() == 2 else seq_lens[:, None].expand(B, Hkv)
    needed, copied = torch.zeros(B, Hkv, dtype=torch.int32), torch.zeros(B, Hkv, dtype=torch.int32)
    plans = {}
    for b, h in ((b, h) for b in range(B) for h in range(Hkv)):
        g = h if lists.shape[2] > 1 else 0
        listed = {int(i) * unit // size for t in range(lists.shape[1]) for i in lists[b, t, g, : int(sizes[b, t, g])]}
        first, end = int(lens[b, h]) // size, -(-(int(lens[b, h]) + new_tokens) // size)
        tail = set(range(first, end))
        wanted = {page for page in listed if page < first}
        needed[b, h] = len(wanted | tail)
        plans[b, h] = wanted, tail
    if int(needed.max()) > C:
        return needed, copied
    for (b, h), (wanted, tail) in plans.items():
        for c, owner in enumerate(owners[b, h].tolist()):
            if owner not in wanted and owner != -1:
                page_table[b, h, owner if owner >= 0 else -2 - owner] = -1
                owners[b, h, c] = -1
        load = sorted(wanted - set(owners[b, h].tolist())) + sorted(tail)
        free = [c for c in range(C) if owners[b, h, c] == -1]
        for page, c in zip(load, free, strict=False):
            owners[b, h, c] = page if page in wanted else -2 - page
            page_table[b, h, page] = (b * Hkv + h) * C + c
            for slot in range(page * size, min((page + 1) * size, int(lens[b, h]) + new_tokens)):
                for source, cache in ((key_source, key_cache), (value_source, value_cache)):
                    row = head_slot(source, b, h, slot, source_table)
                    cache[(b * Hkv + h) * C + c, 0, slot % size] = row
        copied[b, h] = len(load)
    return needed, copied
