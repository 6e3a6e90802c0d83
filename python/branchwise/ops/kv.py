"""Writers of the KV cache: contiguous [B, Hkv, S, D], paged [pages, Hkv, page_size, D] with a table i32[B, N], or with
pages per head [pages, 1, page_size, D] and a table i32[B, Hkv, N]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._load import refuse_grad


def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None = None,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Writes the keys and values of T new tokens into slots ``seq_lens[b]`` .. ``seq_lens[b] + T - 1``, in place.

    With ``cos`` and ``sin`` the keys are given before RoPE and rotated on the way: value i of the first R pairs with
    value i + R/2, as in transformers' ``apply_rotary_pos_emb``; values from R on are copied. The rotation is computed
    in fp32 and rounded once.

    Args:
        key, value: [B, Hkv, T, D] float32, bfloat16 or float16, last dimension contiguous.
        key_cache, value_cache: same dtype, or with scales float8_e4m3fn; mutated.
        seq_lens: i32[B], or i32[B, Hkv] where heads hold different slots; not changed.
        page_table: i32[B, N] or i32[B, Hkv, N], or None for contiguous caches. Pages that are not written to may be
            missing.
        cos, sin: [B, T, R] or [1, T, R] float32 or the dtype of ``key``, R even and at most D; last dimension
            contiguous. What transformers' rotary embedding returns.
        key_scale, value_scale: f32[Hkv], positive: values are divided by those of their head and rounded to e4m3, to
            nearest; what exceeds 448 becomes 448. Keys are rotated, and rounded to their dtype, before.

    Raises:
        RuntimeError: shapes or dtypes disagree, a row's slots do not fit, or a page is out of range; nothing
            is written then.

    Source: card sparse-kernel-interface, family A.
    """
    refuse_grad("append_kv", key, value, key_cache, value_cache)
    torch.ops.branchwise.append_kv.default(
        key, value, key_cache, value_cache, seq_lens, page_table, cos, sin, key_scale, value_scale
    )


@torch.library.register_fake("branchwise::append_kv")
def _(key, value, key_cache, value_cache, seq_lens, page_table=None, *options, **named_options):
    return None


def slot_view(cache: Tensor, row: int, slot: int, page_table: Tensor | None) -> Tensor:
    """View [Hkv, D] of one slot."""
    if page_table is None:
        return cache[row, :, slot]
    page_size = cache.shape[2]
    return cache[int(page_table[row, slot // page_size]), :, slot % page_size]


def append_kv_reference(
    key,
    value,
    key_cache,
    value_cache,
    seq_lens,
    page_table=None,
    *,
    cos=None,
    sin=None,
    key_scale=None,
    value_scale=None,
) -> None:
    """The definition of :func:`append_kv`, slot by slot; RoPE in float64."""
    if cos is not None:
        R = cos.shape[-1]
        x, rest = key[..., :R].double(), key[..., R:]
        turned = torch.cat([-x[..., R // 2 :], x[..., : R // 2]], dim=-1)
        rotated = x * cos[:, None].double() + turned * sin[:, None].double()
        key = torch.cat([rotated.to(key.dtype), rest], dim=-1)
    if key_scale is not None:
        key, value = (
            (x.float() / scale[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
            for x, scale in ((key, key_scale), (value, value_scale))
        )
    for new, cache in ((key, key_cache), (value, value_cache)):
        for b in range(new.shape[0]):
            for t in range(new.shape[2]):
                slot_view(cache, b, int(seq_lens[b]) + t, page_table).copy_(new[b, :, t])


def commit_kv(
    caches: Sequence[Tensor],
    accepted: Tensor,
    num_accepted: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None = None,
) -> Tensor:
    """Moves the slots of accepted nodes together, in place, for all layers in one call.

    Slot P + accepted[b, j] moves to slot P + j for j < num_accepted[b]; what lies behind is garbage that the next
    append overwrites. ``num_accepted`` counts the root, whose KV was written by the same forward as its tree.

    Args:
        caches: key and value caches of all layers, any mix of head counts and dims; mutated. float8_e4m3fn, too.
        accepted: i32[B, A] node ids of the accepted path, ascending; entries after ``num_accepted`` are ignored.
        num_accepted: i32[B], between 0 and A.
        seq_lens: i32[B], or i32[B, Hkv]; not changed.
        page_table: i32[B, N] or i32[B, Hkv, N] shared by all caches, or None for contiguous caches.

    Returns:
        ``seq_lens + num_accepted``, of the shape of ``seq_lens``.

    Raises:
        RuntimeError: a count, node or page is out of range or not ascending; nothing is moved then.

    Source: card tree-verify, op 5 (compact_kv).
    """
    refuse_grad("commit_kv", *caches)
    return torch.ops.branchwise.commit_kv(list(caches), accepted, num_accepted, seq_lens, page_table)


@torch.library.register_fake("branchwise::commit_kv")
def _(caches, accepted, num_accepted, seq_lens, page_table=None):
    return torch.empty_like(seq_lens)


def commit_kv_reference(caches, accepted, num_accepted, seq_lens, page_table=None) -> Tensor:
    """The definition of :func:`commit_kv`: read every source, then write."""
    for cache in caches:
        for b in range(accepted.shape[0]):
            nodes = accepted[b, : int(num_accepted[b])].tolist()
            rows = [slot_view(cache, b, int(seq_lens[b]) + n, page_table).clone() for n in nodes]
            for j, row in enumerate(rows):
                slot_view(cache, b, int(seq_lens[b]) + j, page_table).copy_(row)
    return seq_lens + num_accepted


def evict_kv(
    key_cache: Tensor, value_cache: Tensor, keep: Tensor, counts: Tensor, page_table: Tensor | None = None
) -> None:
    """Moves the kept slots of every list together at the front, in place; what lies behind is garbage.

    Args:
        key_cache, value_cache: contiguous [B, Hkv, S, D] or paged, with pages shared by the heads or per head; mutated.
        keep: i32[B, Hs, K] ascending slots, the first ``counts`` of each list; Hs is 1 (the same for all heads) or Hkv.
        counts: i32[B, Hs].
        page_table: of both caches.

    Raises:
        RuntimeError: a list does not ascend or leaves the cache, or shapes disagree; nothing is moved then.

    Source: card sparse-kernel-interface, family H (compact_kv).
    """
    refuse_grad("evict_kv", key_cache, value_cache)
    torch.ops.branchwise.evict_kv.default(key_cache, value_cache, keep, counts, page_table)


@torch.library.register_fake("branchwise::evict_kv")
def _(key_cache, value_cache, keep, counts, page_table=None):
    return None


def head_slot(cache: Tensor, row: int, head: int, slot: int, page_table: Tensor | None) -> Tensor:
    """View [D] of one slot of one head."""
    if page_table is not None and page_table.dim() == 3:
        return slot_view(cache, row, slot, page_table[:, head])[0]
    return slot_view(cache, row, slot, page_table)[head]


def evict_kv_reference(key_cache, value_cache, keep, counts, page_table=None) -> None:
    """The definition of :func:`evict_kv`: read every source, then write."""
    Hkv = page_table.shape[1] if page_table is not None and page_table.dim() == 3 else key_cache.shape[1]
    for cache in (key_cache, value_cache):
        for b in range(keep.shape[0]):
            for h in range(Hkv):
                g = h if keep.shape[1] > 1 else 0
                kept = keep[b, g, : int(counts[b, g])].tolist()
                rows = [head_slot(cache, b, h, slot, page_table).clone() for slot in kept]
                for j, row in enumerate(rows):
                    head_slot(cache, b, h, j, page_table).copy_(row)


def rerotate_keys(
    key_cache: Tensor,
    begin: Tensor,
    end: Tensor,
    shift: Tensor,
    inv_freq: Tensor,
    page_table: Tensor | None = None,
) -> None:
    """Moves cached keys to other positions: turns slots ``begin[b]`` to ``end[b] - 1`` by ``shift[b]`` more positions.

    A key at position p becomes one at ``p + shift``. Angles are computed in fp64, products in fp32, rounded once per
    call: turn from an unturned copy where a key is moved again and again.

    Args:
        key_cache: [B, Hkv, S, D] or paged, post-RoPE, halves paired as in transformers; mutated.
        begin, end: i32[B] or i32[B, Hkv].
        shift: i64[B] positions, negative to go back.
        inv_freq: f32[R / 2], the rotary embedding's ``inv_freq``; the first R of D values are turned.

    Raises:
        RuntimeError: shapes, dtypes or slots break the rules above; nothing is written then.

    Source: card sparse-kernel-interface, family H (rope_shift); kv-eviction-baselines.
    """
    refuse_grad("rerotate_keys", key_cache)
    torch.ops.branchwise.rerotate_keys.default(key_cache, begin, end, shift, inv_freq, page_table)


@torch.library.register_fake("branchwise::rerotate_keys")
def _(key_cache, begin, end, shift, inv_freq, page_table=None):
    return None


def rerotate_keys_reference(key_cache, begin, end, shift, inv_freq, page_table=None) -> None:
    """The definition of :func:`rerotate_keys` in float64."""
    R = 2 * len(inv_freq)
    Hkv = page_table.shape[1] if page_table is not None and page_table.dim() == 3 else key_cache.shape[1]
    for b in range(len(shift)):
        angle = torch.cat([inv_freq, inv_freq]).double() * int(shift[b])
        for h in range(Hkv):
            first, last = (int(x[b] if x.dim() == 1 else x[b, h]) for x in (begin, end))
            for slot in range(first, last):
                key = head_slot(key_cache, b, h, slot, page_table)
                x = key[:R].double()
                turned = torch.cat([-x[R // 2 :], x[: R // 2]])
                key[:R] = (x * angle.cos() + turned * angle.sin()).to(key.dtype)
