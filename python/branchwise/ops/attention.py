"""Attention of new tokens over a KV cache, causal or under a tree mask."""

import math

import torch
from torch import Tensor

from ._load import refuse_grad


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor | None = None,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of T new tokens per row over the row's cache, which already holds them.

    Row b has P = ``seq_lens[b]`` committed tokens in slots 0..P-1; its new token i is in slot P+i. Every new
    token sees the whole prefix, and of the new tokens those whose bit is set in its mask row: bit j of word
    j//64 for node j. A node must see itself; in a tree, and with a window, it sees only nodes before it, in the blocks
    of a diffusion model also nodes behind. ``tree_mask=None`` means causal.

    For a tree that grows level by level, the mask may have rows for N >= T nodes: those before the last T are in the
    cache from earlier appends, in slots P to P+N-T-1, and the T new tokens follow.

    Args:
        query: [B, Hq, T, D] float32, bfloat16 or float16, post-RoPE; last dimension contiguous. D <= 512.
        key_cache, value_cache: [B, Hkv, S, D], or with ``page_table`` [pages, Hkv, page_size, D]; dtype of ``query``,
            or with scales float8_e4m3fn; Hq a multiple of Hkv (query head h reads KV head h * Hkv // Hq).
        seq_lens: i32[B], tokens in the cache before these T; ``seq_lens + N`` must fit the cache. i32[B, Hkv] where
            the heads of a row hold different slots; without a window then.
        tree_mask: i64[B, N, ceil(N/64)] ancestor bits, as built by :func:`build_tree`, or None.
        page_table: i32[B, N]: slot s of row b is in page ``page_table[b, s // page_size]``. i32[B, Hkv, N] where every
            head has pages of its own, in caches [pages, 1, page_size, D].
        scale: multiplies the logits; 1/sqrt(D) if None.
        window: if positive, a token at position p sees positions > p - window only. The position of node i is
            P + depth(i), so siblings share a window whatever slots they are in.
        sinks: f32[Hq], a learned extra logit per head that takes part in the softmax but has no value.
        softcap: if positive, logits become ``softcap * tanh(logits / softcap)``.
        key_scale, value_scale: f32[Hkv], by which e4m3 keys and values of a head are multiplied.

    Returns:
        ``out`` [B, Hq, T, D] in the dtype of ``query`` and ``lse`` f32[B, Hq, T], the natural log-sum-exp of the
        logits (sink included). fp32 accumulation. Bit-equal for any number of threads and any batch.

    Raises:
        RuntimeError: a shape, dtype, length, page or mask bit breaks the rules above; nothing is read then.

    Source: card tree-verify ("Data layout"); sparse-kernel-interface family E.
    """
    refuse_grad("tree_attention", query, key_cache, value_cache, sinks)
    # By position: keywords cost two microseconds.
    return torch.ops.branchwise.tree_attention.default(
        query,
        key_cache,
        value_cache,
        seq_lens,
        tree_mask,
        page_table,
        scale,
        window,
        sinks,
        softcap,
        key_scale,
        value_scale,
    )


@torch.library.register_fake("branchwise::tree_attention")
def _(query, key_cache, value_cache, seq_lens, tree_mask=None, *options, **named_options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def cascade_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    tree_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`tree_attention` over a paged cache, where rows that share pages read them once.

    Rows that continue one text, such as the branches of a search, name the same pages for what they have in common.
    The op finds that in the page table, 256 slots at a time; nothing has to be planned, and sharing may be of any
    shape: one prefix for all, groups of groups, or none.

    Args:
        query, key_cache, value_cache, seq_lens, tree_mask, scale, window, sinks, softcap, key_scale, value_scale: as
            :func:`tree_attention` takes them; caches [pages, Hkv, page_size, D], whose page size divides 256.
        page_table: i32[B, N]. The new tokens' pages must be the row's own.

    Returns:
        ``out`` [B, Hq, T, D] and ``lse`` f32[B, Hq, T] as :func:`tree_attention` does, up to rounding. Bit-equal for
        any number of threads, any batch, and whatever rows share: a row's result is that of the row alone.

    Raises:
        RuntimeError: a shape, dtype, length, page or mask bit breaks the rules; nothing is read then.

    Source: card shared-prefix-search (Hydragen, DeFT; chunks of equal size regardless of where texts part).
    """
    refuse_grad("cascade_attention", query, key_cache, value_cache, sinks)
    return torch.ops.branchwise.cascade_attention.default(
        query,
        key_cache,
        value_cache,
        seq_lens,
        page_table,
        tree_mask,
        scale,
        window,
        sinks,
        softcap,
        key_scale,
        value_scale,
    )


@torch.library.register_fake("branchwise::cascade_attention")
def _(query, key_cache, value_cache, seq_lens, page_table, *options, **named_options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def path_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor | None = None,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`tree_attention` with sums in the order of the text, so that a token's bits do not depend on the tree.

    A node gets bit for bit what it gets as the only new token after its ancestors were committed: whatever else is in
    the tree, in whatever slots, and however much of its path was in the cache before. :func:`tree_attention` sums keys
    in the order of slots, and in 16 bits the difference flips near-ties.

    Args:
        query, key_cache, value_cache, seq_lens, tree_mask, page_table, scale, window, sinks, softcap, key_scale,
            value_scale: as :func:`tree_attention` takes them. A node of ``tree_mask`` sees nodes in slots before its
            own only; what it sees, in that order, is its path.

    Returns:
        ``out`` [B, Hq, T, D] and ``lse`` f32[B, Hq, T] as :func:`tree_attention` does, up to rounding. Bit-equal for
        any number of threads, any batch, and any tree that a path is in.

    Raises:
        RuntimeError: a shape, dtype, length, page or mask bit breaks the rules; nothing is read then.

    Source: our own. CPU and CUDA. What all paths have in common is read once: on the CPU whole tiles of 64 slots of the
    prefix, and the rest of it once per leaf; on a GPU whole stretches of 256 slots (1024 behind the first 4096), and
    the rest of it once per node.
    """
    refuse_grad("path_attention", query, key_cache, value_cache, sinks)
    return torch.ops.branchwise.path_attention.default(
        query,
        key_cache,
        value_cache,
        seq_lens,
        tree_mask,
        page_table,
        scale,
        window,
        sinks,
        softcap,
        key_scale,
        value_scale,
    )


@torch.library.register_fake("branchwise::path_attention")
def _(query, key_cache, value_cache, seq_lens, *options, **named_options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def tree_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor | None = None,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`tree_attention`, row by row with dense masks, computed in ``dtype``."""
    B, Hq, T, D = query.shape
    out, lse = torch.empty(B, Hq, T, D, dtype=dtype), torch.empty(B, Hq, T, dtype=dtype)
    for b in range(B):
        P, N = int(seq_lens[b]), T if tree_mask is None else tree_mask.shape[1]
        key, value = (gather_row(cache, b, P + N, page_table).to(dtype) for cache in (key_cache, value_cache))
        if key_scale is not None and value_scale is not None:
            key, value = (x * scale.to(dtype)[:, None, None] for x, scale in ((key, key_scale), (value, value_scale)))
        group = Hq // key.shape[0]
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)  # [Hq, P+N, D]
        sees = unpack_mask(tree_mask[b], N) if tree_mask is not None else torch.ones(N, N).tril().bool()
        depth = sees.sum(-1) - 1
        visible = torch.cat([torch.ones(T, P, dtype=torch.bool), sees[N - T :]], dim=1)  # [T, P+N]
        if window > 0:
            positions = torch.cat([torch.arange(P), P + depth])
            visible &= positions[None, :] > (P + depth)[N - T :, None] - window
        logits = query[b].to(dtype) @ key.mT * (scale if scale is not None else 1 / math.sqrt(D))
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible, -math.inf)  # [Hq, T, P+T]
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(dtype)[:, None, None].expand(Hq, T, 1)], dim=-1)
        lse[b] = torch.logsumexp(logits, -1)
        out[b] = torch.softmax(logits, -1)[..., : P + N] @ value
    return out, lse


def gather_row(cache: Tensor, row: int, length: int, page_table: Tensor | None) -> Tensor:
    """The first ``length`` slots of a row, [Hkv, length, D], from a contiguous or paged cache."""
    if page_table is None:
        return cache[row, :, :length]
    page_size = cache.shape[2]
    pages = page_table[row, : -(-length // page_size)].long()
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]


def head_rows(cache: Tensor, row: int, head: int, length: int, page_table: Tensor | None) -> Tensor:
    """The first ``length`` slots of a row and head, [length, D]; the table may have pages per head."""
    if page_table is not None and page_table.dim() == 3:
        return gather_row(cache, row, length, page_table[:, head])[0]
    return gather_row(cache, row, length, page_table)[head]


def unpack_mask(tree_mask: Tensor, T: int) -> Tensor:
    """bool[..., T, T] from ancestor words i64[..., T, W]."""
    bits = (tree_mask[..., None] >> torch.arange(64)) & 1
    return bits.flatten(-2)[..., :T].bool()


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins the attention of the same queries over two disjoint sets of keys.

    Args:
        out_a, out_b: [B, Hq, T, D] float32, bfloat16 or float16, contiguous.
        lse_a, lse_b: f32[B, Hq, T], natural log; -inf marks an empty set, whose ``out`` is ignored.

    Returns:
        ``out`` and ``lse`` of the union, shapes and dtypes of the inputs. Two empty sets give 0 and -inf.

    Raises:
        RuntimeError: shapes or dtypes disagree, or a tensor is not contiguous.

    Source: card sparse-kernel-interface, family H. CPU and CUDA.
    """
    refuse_grad("merge_attention", out_a, out_b)
    return torch.ops.branchwise.merge_attention(out_a, lse_a, out_b, lse_b)


@torch.library.register_fake("branchwise::merge_attention")
def _(out_a, lse_a, out_b, lse_b):
    return torch.empty_like(out_a), torch.empty_like(lse_a)


def merge_attention_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of :func:`merge_attention` in float64."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    out = torch.zeros(out_a.shape, dtype=torch.float64)
    for side, side_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(side_lse.double() - lse).nan_to_num(0.0)[..., None]
        out += torch.where(weight > 0, side.double() * weight, 0.0)
    return out, lse
