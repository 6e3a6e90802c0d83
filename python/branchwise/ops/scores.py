"""What KV policies look at: summaries of pages, their scores, and where the attention's mass lies."""

import math

import torch
from torch import Tensor

from ._load import refuse_grad
from .attention import head_rows

_REDUCE = {"sum": 0, "max": 1}


def _reduce(op: str, reduce: str) -> int:
    if reduce not in _REDUCE:
        raise ValueError(f"{op}: reduce must be 'sum' or 'max', got {reduce!r}")
    return _REDUCE[reduce]


def _length(lengths: Tensor, row: int, head: int) -> int:
    return int(lengths[row] if lengths.dim() == 1 else lengths[row, head])


def page_summaries(
    key_cache: Tensor,
    begin: Tensor,
    end: Tensor,
    summaries: Tensor,
    page_size: int = 0,
    *,
    segment_offsets: Tensor | None = None,
    page_table: Tensor | None = None,
) -> None:
    """Summarises the pages that slots ``begin[b]`` to ``end[b] - 1`` lie in, into ``summaries``, in place.

    Every touched page is summarised anew from its first slot up to ``end``, so the call serves a prompt and an append,
    and after a roll-back: call it again with the new end. Pages that lie elsewhere keep their summaries.

    Args:
        key_cache: [B, Hkv, S, D], or paged; float32, bfloat16 or float16.
        begin, end: i32[B] or i32[B, Hkv], slots; with ``segment_offsets``, segments.
        summaries: [B, Hkv, N, 2 D], the largest and then the smallest value of every channel, or [B, Hkv, N, D], the
            mean, in the dtype of the cache or float8_e4m3fn; contiguous; mutated. Largest and smallest are exact in
            the dtype of the cache, and in e4m3 to nearest, at most 448, so that they bound no longer.
        page_size: slots per unit; any number, whatever the cache's pages are.
        segment_offsets: i32[B, Hkv, N + 1]: units of any length instead of pages. An empty one is summarised as 0.
        page_table: of the cache.

    Raises:
        RuntimeError: shapes or dtypes disagree, or a slot or unit lies outside; nothing is written then.

    Source: card sparse-kernel-interface, family B; quest-pages.
    """
    refuse_grad("page_summaries", key_cache)
    torch.ops.branchwise.page_summaries.default(
        key_cache, begin, end, summaries, page_size, segment_offsets, page_table
    )


@torch.library.register_fake("branchwise::page_summaries")
def _(key_cache, begin, end, summaries, page_size, segment_offsets=None, page_table=None):
    return None


def page_summaries_reference(
    key_cache, begin, end, summaries, page_size=0, *, segment_offsets=None, page_table=None
) -> None:
    """The definition of :func:`page_summaries`, unit by unit."""
    B, Hkv, _, width = summaries.shape
    for b in range(B):
        for h in range(Hkv):
            low, high = _length(begin, b, h), _length(end, b, h)
            if low >= high:
                continue
            units = range(low // page_size, -(-high // page_size)) if segment_offsets is None else range(low, high)
            for n in units:
                if segment_offsets is None:
                    first, last = n * page_size, min((n + 1) * page_size, high)
                else:
                    first, last = segment_offsets[b, h, n : n + 2].tolist()
                keys = head_rows(key_cache, b, h, last, page_table)[first:].double()
                if width == 2 * keys.shape[1]:
                    unit = torch.cat([keys.amax(0), keys.amin(0)]) if len(keys) else keys.new_zeros(width)
                else:
                    unit = keys.mean(0) if len(keys) else keys.new_zeros(width)
                most = torch.finfo(summaries.dtype).max
                summaries[b, h, n] = unit.clamp(-most, most).to(summaries.dtype)


def score_pages(
    query: Tensor,
    summaries: Tensor,
    num_pages: Tensor,
    *,
    reduce: str = "max",
    per_token: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """How much queries may like pages, from the pages' summaries.

    A query's score of a page is ``scale`` times its product with the mean, or with largest and smallest values
    ``sum_d max(q_d * largest_d, q_d * smallest_d)``: an upper bound of its product with every key of the page.

    Args:
        query: [B, Hq, T, D] float32, bfloat16 or float16, post-RoPE.
        summaries: [B, Hkv, N, D] or [B, Hkv, N, 2 D], as :func:`page_summaries` leaves them, in the dtype of the query
            or float8_e4m3fn, of which values below 2**-6 may count as 0 and NaN as 480; 2 D <= 512. A key cache may be
            given as its own summaries, a page per token.
        num_pages: i32[B] or i32[B, Hkv], pages that have a summary.
        reduce: "max" or "sum" over the query heads of a KV head, and over the tokens unless ``per_token``.
        per_token: scores of every token by itself.
        normalize: take each query's softmax over the pages before reducing.

    Returns:
        f32[B, T or 1, Hkv, N]; -inf behind ``num_pages``.

    Raises:
        ValueError: unknown ``reduce``.
        RuntimeError: shapes, dtypes or counts disagree; nothing is read then.

    Source: card sparse-kernel-interface, family C; quest-pages.
    """
    refuse_grad("score_pages", query, summaries)
    return torch.ops.branchwise.score_pages.default(
        query, summaries, num_pages, _reduce("score_pages", reduce), per_token, normalize, scale
    )


@torch.library.register_fake("branchwise::score_pages")
def _(query, summaries, num_pages, reduce, per_token, normalize=False, scale=1.0):
    B, _, T, _ = query.shape
    shape = (B, T if per_token else 1, *summaries.shape[1:3])
    return query.new_empty(shape, dtype=torch.float32)


def score_pages_reference(
    query, summaries, num_pages, *, reduce="max", per_token=False, normalize=False, scale=1.0
) -> Tensor:
    """The definition of :func:`score_pages` in float64."""
    B, Hq, T, D = query.shape
    Hkv, N, width = summaries.shape[1:]
    q = query.double().view(B, Hkv, Hq // Hkv, T, 1, D)
    s = summaries.double()[:, :, None, None]  # [B, Hkv, 1, 1, N, width]
    scores = (q * s).sum(-1) if width == D else torch.maximum(q * s[..., :D], q * s[..., D:]).sum(-1)
    scores = scores * scale  # [B, Hkv, G, T, N]
    counts = num_pages if num_pages.dim() == 2 else num_pages[:, None].expand(B, Hkv)
    hidden = (torch.arange(N) >= counts[..., None])[:, :, None, None]
    if normalize:
        scores = scores.masked_fill(hidden, -math.inf).softmax(-1)
    dims = (2,) if per_token else (2, 3)
    scores = scores.amax(dims, keepdim=True) if reduce == "max" else scores.sum(dims, keepdim=True)
    return scores.masked_fill(hidden, -math.inf)[:, :, 0].transpose(1, 2)


def attention_mass(
    query: Tensor,
    key_cache: Tensor,
    seq_lens: Tensor,
    *,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    page_table: Tensor | None = None,
    reduce: str = "sum",
    per_query_head: bool = False,
    per_token: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Column sums (or maxima) of the attention probabilities of the last T tokens, without the matrix.

    As in :func:`tree_attention`, the T queries are those of the tokens in slots ``seq_lens[b]`` and on, whose keys the
    cache holds already; query t sees the slots up to its own. Two passes over the keys, or one with ``lse``.

    Args:
        query: [B, Hq, T, D] float32, bfloat16 or float16, post-RoPE: a window of a prompt's last tokens, or a token.
        key_cache: [B, Hkv, S, D], or paged.
        seq_lens: i32[B] or i32[B, Hkv], slots before the T tokens.
        lse: f32[B, Hq, T] of the queries, as attention returned it; computed if None.
        weights: f32[B, T], not negative: factors of the queries; 0 leaves one out.
        reduce: "sum" or "max" over the tokens unless ``per_token``, and over the query heads of a KV head unless
            ``per_query_head``.
        scale, softcap: as in the attention.

    Returns:
        f32[B, 1 or T, Hkv or Hq, slots of the cache], 0 behind the last token.

    Raises:
        ValueError: unknown ``reduce``.
        RuntimeError: shapes, dtypes or lengths disagree; nothing is read then.

    Source: card sparse-kernel-interface, family F; kv-eviction-baselines.
    """
    refuse_grad("attention_mass", query, key_cache)
    return torch.ops.branchwise.attention_mass.default(
        query,
        key_cache,
        seq_lens,
        lse,
        weights,
        page_table,
        _reduce("attention_mass", reduce),
        per_query_head,
        per_token,
        scale,
        softcap,
    )


@torch.library.register_fake("branchwise::attention_mass")
def _(query, key_cache, seq_lens, lse, weights, page_table=None, reduce=0, per_head=False, per_token=False, *rest):
    slots, heads = key_cache.shape[2], key_cache.shape[1]
    if page_table is not None:
        slots *= page_table.shape[-1]
        heads = page_table.shape[1] if page_table.dim() == 3 else heads
    B, Hq, T, _ = query.shape
    return query.new_empty((B, T if per_token else 1, Hq if per_head else heads, slots), dtype=torch.float32)


def attention_mass_reference(
    query,
    key_cache,
    seq_lens,
    *,
    lse=None,
    weights=None,
    page_table=None,
    reduce="sum",
    per_query_head=False,
    per_token=False,
    scale=None,
    softcap=0.0,
) -> Tensor:
    """The definition of :func:`attention_mass` in float64, with the matrix."""
    B, Hq, T, D = query.shape
    per_head = page_table is not None and page_table.dim() == 3
    Hkv = page_table.shape[1] if per_head else key_cache.shape[1]
    slots = key_cache.shape[2] * (1 if page_table is None else page_table.shape[-1])
    out = torch.zeros(B, T if per_token else 1, Hq if per_query_head else Hkv, slots, dtype=torch.float64)
    for b in range(B):
        for h in range(Hkv):
            P = _length(seq_lens, b, h)
            key = head_rows(key_cache, b, h, P + T, page_table).double()
            heads = slice(h * Hq // Hkv, (h + 1) * Hq // Hkv)
            logits = query[b, heads].double() @ key.mT * (scale if scale is not None else 1 / math.sqrt(D))
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~torch.ones(T, P + T).tril(P).bool(), -math.inf)
            whole = logits.logsumexp(-1) if lse is None else lse[b, heads].double()
            mass = (logits - whole[..., None]).exp()  # [G, T, P + T]
            if weights is not None:
                mass = mass * weights[b].double()[None, :, None]
            if not per_token:
                mass = mass.amax(1, keepdim=True) if reduce == "max" else mass.sum(1, keepdim=True)
            if per_query_head:
                out[b, :, heads, : P + T] = mass.transpose(0, 1)
            else:
                out[b, :, h, : P + T] = mass.amax(0) if reduce == "max" else mass.sum(0)
    return out
