"""Attention to a chosen part of the KV cache: lists, ranges, or both."""

import math

import torch
from torch import Tensor

from ._load import refuse_grad
from .attention import head_rows, unpack_mask

ALL = 2**31 - 1  # as a recent size: a head that sees everything


def sparse_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    unit: int = 1,
    segment_offsets: Tensor | None = None,
    sink_sizes: Tensor | None = None,
    recent_sizes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`tree_attention` to a part of the prefix: listed units, ranges per head, or the union of both.

    The softmax is over the visible slots only, and nothing else is read. New tokens see each other as in
    :func:`tree_attention`. Units and ranges may overlap; a slot counts once.

    Args:
        query, key_cache, value_cache, seq_lens, tree_mask, page_table, scale, sinks, softcap, key_scale, value_scale:
            as in :func:`tree_attention`. ``seq_lens`` may be i32[B, Hkv], lengths per head, and ``page_table`` i32[B,
            Hkv, N], pages per head. Pages that hold nothing visible may be missing (any number in the table).
        indices: i32[B, Hs, K] listed units, ascending, the first ``counts`` of each list; Hs is 1 (all heads share the
            list) or Hkv. i32[B, T, Hs, K] gives every new token a list of its own, so that the nodes of a tree see
            what they would see one at a time.
        counts: i32, the shape of ``indices`` without K.
        unit: slots per unit: unit i is slots ``i * unit`` to ``(i + 1) * unit - 1``, as far as they are committed. 1
            for tokens, the page size for pages (any number may be used on any cache).
        segment_offsets: i32[B, Hs, S + 1]; units are segments of any length, slots ``offsets[i]`` to
            ``offsets[i + 1] - 1``.
        sink_sizes, recent_sizes: i32[Hkv]. KV head h sees positions below ``sink_sizes[h]`` and, from position p,
            those above ``p - recent_sizes[h]``; ``ops.sparse.ALL`` makes it a full head. With ``indices``, the recent
            range is that of the first new token, and all of its successors see it.

    Returns:
        ``out`` [B, Hq, T, D] and ``lse`` f32[B, Hq, T], as :func:`tree_attention`. Bit-equal for any number of threads
        and any batch.

    Raises:
        RuntimeError: a list does not ascend or leaves the committed slots, a visible page is out of range, or a rule of
            :func:`tree_attention` is broken; nothing is read then.

    Source: card sparse-kernel-interface, family E.
    """
    refuse_grad("sparse_attention", query, key_cache, value_cache, sinks)
    return torch.ops.branchwise.sparse_attention.default(
        query,
        key_cache,
        value_cache,
        seq_lens,
        indices,
        counts,
        unit,
        segment_offsets,
        sink_sizes,
        recent_sizes,
        tree_mask,
        page_table,
        scale,
        sinks,
        softcap,
        key_scale,
        value_scale,
    )


@torch.library.register_fake("branchwise::sparse_attention")
def _(query, key_cache, value_cache, seq_lens, *options, **named_options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def sparse_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    unit: int = 1,
    segment_offsets: Tensor | None = None,
    sink_sizes: Tensor | None = None,
    recent_sizes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`sparse_attention`, head by head with dense masks, computed in ``dtype``."""
    B, Hq, T, D = query.shape
    Hkv = page_table.shape[1] if page_table is not None and page_table.dim() == 3 else key_cache.shape[1]
    N = T if tree_mask is None else tree_mask.shape[1]
    out, lse = torch.empty(B, Hq, T, D, dtype=dtype), torch.empty(B, Hq, T, dtype=dtype)
    for b in range(B):
        sees = unpack_mask(tree_mask[b], N) if tree_mask is not None else torch.ones(N, N).tril().bool()
        depth = sees.sum(-1) - 1
        for h in range(Hkv):
            P = int(seq_lens[b] if seq_lens.dim() == 1 else seq_lens[b, h])
            key, value = (head_rows(cache, b, h, P + N, page_table).to(dtype) for cache in (key_cache, value_cache))
            if key_scale is not None and value_scale is not None:
                key, value = key * key_scale[h].to(dtype), value * value_scale[h].to(dtype)
            listed = torch.zeros(T, P, dtype=torch.bool)
            if indices is not None and counts is not None:
                lists = indices[b] if indices.dim() == 4 else indices[b].expand(T, *indices.shape[1:])
                sizes = counts[b] if indices.dim() == 4 else counts[b].expand(T, -1)
                g = h if lists.shape[1] > 1 else 0
                for t in range(T):
                    for i in lists[t, g, : int(sizes[t, g])].tolist():
                        if segment_offsets is None:
                            listed[t, i * unit : (i + 1) * unit] = True
                        else:
                            listed[t, int(segment_offsets[b, g, i]) : int(segment_offsets[b, g, i + 1])] = True
            visible = torch.cat([listed, sees[N - T :]], dim=1)
            if sink_sizes is not None and recent_sizes is not None:
                positions = torch.cat([torch.arange(P), P + depth])
                own = (P + depth)[N - T :, None] if indices is None else torch.full((T, 1), P)
                ranges = (positions < sink_sizes[h]) | (positions[None] > own - int(recent_sizes[h]))
                ranges[torch.arange(T), P + N - T + torch.arange(T)] = True  # a token sees itself
                if indices is None:
                    visible = ranges & torch.cat([torch.ones(T, P, dtype=torch.bool), sees[N - T :]], dim=1)
                else:
                    visible[:, :P] |= ranges[:, :P]
            heads = slice(h * Hq // Hkv, (h + 1) * Hq // Hkv)
            logits = query[b, heads].to(dtype) @ key.mT * (scale if scale is not None else 1 / math.sqrt(D))
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~visible, -math.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[heads].to(dtype)[:, None, None].expand(-1, T, 1)], dim=-1)
            lse[b, heads] = torch.logsumexp(logits, -1)
            out[b, heads] = torch.softmax(logits, -1)[..., : P + N] @ value
    return out, lse
