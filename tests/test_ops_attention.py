"""tree_attention and merge_attention against their fp64 definitions, on every instruction set."""

import math

import pytest
import torch

import attention_cases
from attention_cases import CASES, Case
from branchwise import ops
from branchwise.ops.attention import merge_attention_reference, tree_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def error(actual, exact):
    return (actual.double() - exact).abs().max().item()


def check_against_definition(*args, **options):
    """Error at most twice that of the same formula in this dtype, plus its noise floor (flash-attention's rule)."""
    dtype = args[0].dtype
    out, lse = ops.tree_attention(*args, **options)
    exact, exact_lse = tree_attention_reference(*args, **options)
    plain, _ = tree_attention_reference(*args, **options, dtype=dtype)
    assert out.dtype == dtype and lse.dtype == torch.float32
    floor = (exact.to(dtype).double() - exact).abs().max().item()
    assert error(out, exact) <= 2 * error(plain, exact) + floor + 1e-6
    # fp32 logits of size x carry a relative error of 1e-7 or so each
    assert error(lse, exact_lse) <= 2e-6 * max(10.0, exact_lse.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_definition(case, dtype, isa):
    inputs = attention_cases.make(case, dtype)
    check_against_definition(*inputs.args, **inputs.options)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("reach", [4.0, 60.0])
@pytest.mark.parametrize("falling", [False, True])
def test_scores_that_rise_and_fall_along_the_text(falling, reach, T, dtype, isa):
    """Maxima move in every tile, by less than what outputs are scaled for and by more."""
    torch.manual_seed(0)
    P, D = 700, 64
    query = torch.zeros(1, 2, T, D)
    query[..., 0] = 8.0 * torch.linspace(0.5, 1, T)  # with the scale of 1 / 8, key[..., 0] is a score
    key, value = torch.randn(1, 1, P + T, D), torch.randn(1, 1, P + T, D)
    rise = torch.linspace(-reach, reach, P + T)
    key[..., 0] = rise.flip(0) if falling else rise
    check_against_definition(query.to(dtype), key.to(dtype), value.to(dtype), torch.tensor([P], dtype=torch.int32))


# Few rows and many, enough slots for several splits and threads, blocks of rows, one product per dtype.
SPLIT_CASES = [
    Case(B=2, T=1, Hq=8, Hkv=2, D=128, prefix=3000),
    Case(B=3, Hq=9, Hkv=3, T=17, prefix=900),
    Case(B=1, Hq=4, Hkv=1, T=200, prefix=1500, sinks=True, window=700),
    Case(B=2, Hq=4, Hkv=1, T=20, before=60, prefix=700),
    Case(B=2, Hq=4, Hkv=1, T=32, prefix=100),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_bit_equal_for_any_thread_count(case, dtype, threads, isa):
    inputs = attention_cases.make(case, dtype)
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(ops.tree_attention(*inputs.args, **inputs.options))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", [Case(B=7, T=1), Case(B=7, T=16, Hq=9, Hkv=3), Case(B=5, T=40, page_size=16)], ids=str)
def test_bit_equal_for_any_batch(case, dtype):
    inputs = attention_cases.make(case, dtype)
    query, key, value, seq_lens, mask = inputs.args
    table = inputs.options.pop("page_table")
    out, lse = ops.tree_attention(query, key, value, seq_lens, mask, page_table=table, **inputs.options)
    for b in range(case.B):
        row = slice(b, b + 1)
        cache = (key, value) if table is not None else (key[row], value[row])
        alone, alone_lse = ops.tree_attention(
            query[row], *cache, seq_lens[row], mask[row], page_table=None if table is None else table[row]
        )
        assert torch.equal(alone, out[row]) and torch.equal(alone_lse, lse[row])


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_lse_over_64k_slots(dtype, T, isa):
    inputs = attention_cases.make(Case(Hq=2, Hkv=1, D=64, T=T, prefix=65536), dtype)
    out, lse = ops.tree_attention(*inputs.args)
    exact, exact_lse = tree_attention_reference(*inputs.args)
    assert error(lse, exact_lse) < 1e-4
    assert error(out, exact) <= 2 * torch.finfo(dtype).eps * exact.abs().max() + 1e-6


def test_paged_equals_contiguous():
    inputs = attention_cases.make(Case(B=2, T=30, page_size=16), torch.float32)
    query, key, value, seq_lens, mask = inputs.args
    table = inputs.options["page_table"].long()
    flat = [cache[table].transpose(1, 2).flatten(2, 3).contiguous() for cache in (key, value)]
    paged = ops.tree_attention(*inputs.args, page_table=inputs.options["page_table"])
    contiguous = ops.tree_attention(query, *flat, seq_lens, mask)
    assert torch.equal(paged[0], contiguous[0]) and torch.equal(paged[1], contiguous[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("T, D", [(1, 80), (8, 64), (8, 128), (30, 80)])
def test_strided_and_unaligned_caches(T, D, dtype, isa):
    """[B, S, Hkv, D] storage seen as [B, Hkv, S, D], beginning one element off any alignment; and slots one element
    further apart than they are long."""
    inputs = attention_cases.make(Case(B=2, T=T, Hq=6, Hkv=3, D=D), dtype)
    query, key, value, seq_lens, mask = inputs.args
    B, H, S, _ = key.shape
    expected = ops.tree_attention(*inputs.args)
    for view in (
        lambda: torch.empty(key.numel() + 1, dtype=dtype)[1:].view(B, S, H, D).transpose(1, 2),
        lambda: torch.empty(B, H, S, D + 1, dtype=dtype)[..., :D],
    ):
        out = ops.tree_attention(query, *(view().copy_(cache) for cache in (key, value)), seq_lens, mask)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize("T, window", [(70, 0), (20, 33), (70, 33)])
def test_chain_mask_equals_causal(T, window):
    inputs = attention_cases.make(Case(B=2, T=T, tree=False), torch.float32)
    query, key, value, seq_lens, _ = inputs.args
    parents = torch.arange(-1, T - 1, dtype=torch.int32).expand(2, T).contiguous()
    mask = ops.build_tree(parents, seq_lens)[0]
    causal = ops.tree_attention(*inputs.args, window=window)
    tree = ops.tree_attention(query, key, value, seq_lens, mask, window=window)
    if window == 0 or T == 20:
        assert torch.equal(causal[0], tree[0])
    else:  # blocks of a causal prompt begin at the window of their own first token, so sums differ in order
        torch.testing.assert_close(causal[0], tree[0], atol=1e-6, rtol=1e-6)


def test_reads_nothing_behind_the_tokens():
    """Slots behind P+T may hold anything, also NaN."""
    inputs = attention_cases.make(Case(B=3, T=5), torch.float32)
    query, key, value, seq_lens, mask = inputs.args
    clean = ops.tree_attention(*inputs.args)
    for b in range(3):
        key[b, :, int(seq_lens[b]) + 5 :] = math.nan
        value[b, :, int(seq_lens[b]) + 5 :] = math.nan
    dirty = ops.tree_attention(query, key, value, seq_lens, mask)
    assert torch.equal(clean[0], dirty[0])


def test_nan_in_a_visible_key_reaches_the_output():
    inputs = attention_cases.make(Case(T=5, tree=False), torch.float32)
    inputs.args[1][0, 0, 3] = math.nan
    out, _ = ops.tree_attention(*inputs.args)
    assert out[:, :2].isnan().all() and not out[:, 2:].isnan().any()


def test_empty_inputs():
    query = torch.zeros(0, 4, 3, 32)
    cache = torch.zeros(0, 2, 8, 32)
    out, lse = ops.tree_attention(query, cache, cache, torch.zeros(0, dtype=torch.int32))
    assert out.shape == query.shape and lse.shape == (0, 4, 3)


def bad_calls():
    def call(**changes):
        inputs = attention_cases.make(Case(B=2, T=3, prefix=20), torch.float32)
        names = ["query", "key_cache", "value_cache", "seq_lens", "tree_mask"]
        arguments = {**dict(zip(names, inputs.args, strict=True)), **inputs.options, **changes}
        return ops.tree_attention(**arguments)

    table = torch.zeros(2, 3, dtype=torch.int32)
    high_bit = torch.full((2, 3, 1), 0b100, dtype=torch.int64)
    yield "query must have shape", lambda: call(query=torch.zeros(2, 4, 64))
    yield "query must be float32", lambda: call(query=torch.zeros(2, 4, 3, 64, dtype=torch.float64))
    yield "query must be contiguous in its last", lambda: call(query=torch.zeros(2, 4, 64, 3).mT)
    yield "key_cache must be float32, got bfloat16", lambda: call(key_cache=torch.zeros(2, 2, 30, 64).bfloat16())
    yield "key_cache.size\\(0\\) must be B = 2", lambda: call(key_cache=torch.zeros(3, 2, 30, 64))
    yield "key_cache.size\\(3\\) must be D", lambda: call(key_cache=torch.zeros(2, 2, 26, 32))
    yield "value_cache must have the shape of key_cache", lambda: call(value_cache=torch.zeros(2, 2, 99, 64))
    yield "query heads Hq = 4 must be a multiple", lambda: call(key_cache=torch.zeros(2, 3, 26, 64))
    yield "head dim between 1 and 512", lambda: call(query=torch.zeros(2, 4, 3, 513))
    yield "seq_lens must be int32, got int64", lambda: call(seq_lens=torch.tensor([3, 4]))
    yield "seq_lens\\[1\\] = 100 plus 3 new", lambda: call(seq_lens=torch.tensor([3, 100], dtype=torch.int32))
    yield "seq_lens\\[0\\] = -1", lambda: call(seq_lens=torch.tensor([-1, 5], dtype=torch.int32))
    yield "tree_mask.size\\(2\\) must be ceil", lambda: call(tree_mask=torch.zeros(2, 3, 2, dtype=torch.int64))
    yield "tree_mask must be int64", lambda: call(tree_mask=torch.zeros(2, 3, 1, dtype=torch.int32))
    yield "bit above its own node, which goes with no window", lambda: call(tree_mask=high_bit, window=5)
    yield "has bit 3 set, and there are 3 nodes", lambda: call(tree_mask=high_bit * 2 + 1)
    yield "lacks its own bit", lambda: call(tree_mask=torch.zeros(2, 3, 1, dtype=torch.int64))
    yield "tree_mask.size\\(1\\) = 2 must be at least T = 3", lambda: call(tree_mask=high_bit[:, :2])
    yield "plus 40 new slots", lambda: call(tree_mask=torch.zeros(2, 40, 1, dtype=torch.int64))
    yield "window must be 0", lambda: call(window=-1)
    yield "softcap must be 0", lambda: call(softcap=-2.0)
    yield "sinks.size\\(0\\) must be Hq = 4", lambda: call(sinks=torch.zeros(3))
    yield "page_table must be int32", lambda: call(page_table=table.long())
    pool = torch.zeros(4, 2, 16, 64)
    bad_page = torch.tensor([[0, 1], [2, 4]], dtype=torch.int32)
    yield "page_table\\[1, 1\\] = 4", lambda: call(key_cache=pool, value_cache=pool, page_table=bad_page)
    yield "no gradient", lambda: call(query=torch.zeros(2, 4, 3, 64, requires_grad=True))


@pytest.mark.parametrize("message, call", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("case", [Case(), Case(page_size=16, window=5, sinks=True, softcap=2.0)], ids=str)
def test_opcheck_tree_attention(case):
    inputs = attention_cases.make(case, torch.float32)
    torch.library.opcheck(torch.ops.branchwise.tree_attention, inputs.args, inputs.options)


def merge_inputs(dtype, empty=False):
    g = torch.Generator().manual_seed(0)
    out_a, out_b = (torch.randn(2, 3, 5, 36, generator=g).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(2, 3, 5, generator=g) * 20 for _ in range(2))
    if empty:
        lse_a[0], out_a[0] = -math.inf, math.nan
        lse_b[:, 0], out_b[:, 0] = -math.inf, math.nan
    return out_a, lse_a, out_b, lse_b


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_merge_attention(dtype, empty, isa):
    inputs = merge_inputs(dtype, empty)
    out, lse = ops.merge_attention(*inputs)
    exact, exact_lse = merge_attention_reference(*inputs)
    assert error(out, exact) <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-6)


def test_merging_prefix_and_tail_gives_the_whole():
    """Attention over slots [0, P) merged with attention over [P, P+T) is attention over all of them."""
    inputs = attention_cases.make(Case(B=1, T=9, prefix=200, tree=False), torch.float32)
    query, key, value, seq_lens, _ = inputs.args
    P, T = 200, 9
    whole = ops.tree_attention(query, key, value, seq_lens)
    zero = torch.zeros(1, dtype=torch.int32)
    tail = ops.tree_attention(query, key[:, :, P : P + T], value[:, :, P : P + T], zero)
    logits = query @ key[:, :, :P].repeat_interleave(2, 1).mT / 8.0
    prefix = logits.softmax(-1) @ value[:, :, :P].repeat_interleave(2, 1), logits.logsumexp(-1)
    out, lse = ops.merge_attention(prefix[0].contiguous(), prefix[1].contiguous(), *tail)
    torch.testing.assert_close(out, whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole[1], atol=1e-5, rtol=1e-5)


def test_merge_attention_refuses():
    out_a, lse_a, out_b, lse_b = merge_inputs(torch.float32)
    with pytest.raises(RuntimeError, match=r"out_b.size\(2\)"):
        ops.merge_attention(out_a, lse_a, out_b[:, :, :3], lse_b)
    with pytest.raises(RuntimeError, match=r"lse_b must be float32, got float64"):
        ops.merge_attention(out_a, lse_a, out_b, lse_b.double())
    with pytest.raises(RuntimeError, match=r"out_b must be contiguous"):
        ops.merge_attention(out_a, lse_a, out_b.mT.contiguous().mT, lse_b)


def test_opcheck_merge_attention():
    torch.library.opcheck(torch.ops.branchwise.merge_attention, merge_inputs(torch.float32))
