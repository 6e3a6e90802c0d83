"""Summaries, scores, selections, eviction and re-rotation against their definitions."""

import math

import pytest
import torch

import attention_cases
from attention_cases import Case
from branchwise import ops
from branchwise.ops.kv import evict_kv_reference, rerotate_keys_reference
from branchwise.ops.scores import attention_mass_reference, page_summaries_reference, score_pages_reference
from branchwise.ops.select import select_pages_reference, select_slots_reference
from test_ops_attention import DTYPES, SHORT

LAYOUTS = ["contiguous", "paged", "head_pages"]
E4M3 = torch.float8_e4m3fn


def cache_of(B, Hkv, D, S, dtype, layout="contiguous", page_size=8, seed=0):
    """Key and value cache, page table."""
    g = torch.Generator().manual_seed(seed)
    if layout == "contiguous":
        return *(torch.randn(B, Hkv, S, D, generator=g).to(dtype) for _ in range(2)), None
    per_row = -(-S // page_size)
    heads, lists = (Hkv, 1) if layout == "paged" else (1, Hkv)
    pools = [torch.randn(B * lists * per_row, heads, page_size, D, generator=g).to(dtype) for _ in range(2)]
    table = torch.randperm(B * lists * per_row, generator=g).int()
    return *pools, table.view(B, per_row) if layout == "paged" else table.view(B, Hkv, per_row)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def lens_of(layout, *lens):
    """i32[B], or lengths of 3 heads that differ."""
    lens = int32(*lens)
    return lens if layout != "head_pages" else torch.stack([lens, lens // 2, lens - 1], -1).clamp(min=0).contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["min_max", "mean"])
@pytest.mark.parametrize("eight", [False, True], ids=["", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_page_summaries(dtype, eight, kind, layout, isa):
    key, _, table = cache_of(2, 3, 40, 100, dtype, layout)
    width = 80 if kind == "min_max" else 40
    kept_in = E4M3 if eight else dtype
    summaries = torch.full((2, 3, 15, width), 7.0, dtype=kept_in)
    expected = summaries.clone()
    middle = lens_of(layout, 90, 33)
    for begin, end in ((lens_of(layout, 0, 0), middle), (middle, lens_of(layout, 99, 34))):
        for op, to in ((ops.page_summaries, summaries), (page_summaries_reference, expected)):
            op(key, begin, end, to, 7, page_table=table)
    if kind == "min_max":
        assert torch.equal(summaries.float(), expected.float())
    else:
        eps = torch.finfo(kept_in).eps
        torch.testing.assert_close(summaries.float(), expected.float(), atol=1e-6, rtol=2 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_summaries_in_e4m3_are_rounded_as_torch_rounds(dtype, isa):
    every = torch.arange(2**16 if dtype != torch.float32 else 2**15).to(torch.int32)
    values = every.to(torch.int16).view(dtype) if dtype != torch.float32 else (every * 2**17 + 2**19 - 1).view(dtype)
    values = values[values.isfinite()]
    key = torch.nn.functional.pad(values, (0, -len(values) % 48)).view(1, 1, -1, 48)
    summaries = torch.zeros(1, 1, key.shape[2], 96, dtype=E4M3)
    ops.page_summaries(key, int32(0), int32(key.shape[2]), summaries, 1)
    expected = key.float().clamp(-448, 448).to(E4M3).view(torch.uint8)
    assert torch.equal(summaries.view(torch.uint8), torch.cat([expected, expected], -1))


def test_summaries_of_appends_and_roll_backs_equal_those_made_at_once():
    key, _, _ = cache_of(1, 2, 32, 200, torch.float32)
    grown, fresh = (torch.zeros(1, 2, 13, 64) for _ in range(2))
    g = torch.Generator().manual_seed(3)
    length = 0
    for _ in range(60):
        length = max(0, length - int(torch.randint(0, 12, (), generator=g)))  # rejected: others take their slots
        new = min(200, length + int(torch.randint(1, 20, (), generator=g)))
        key[:, :, length:new] = torch.randn(1, 2, new - length, 32, generator=g)
        ops.page_summaries(key, int32(length), int32(new), grown, 16)
        length = new
        ops.page_summaries(key, int32(0), int32(length), fresh.zero_(), 16)
        pages = -(-length // 16)
        assert torch.equal(grown[:, :, :pages], fresh[:, :, :pages])


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_segment_means(dtype, isa):
    key, _, _ = cache_of(2, 2, 48, 90, dtype)
    offsets = int32([[0, 5, 5, 40, 90], [3, 10, 11, 12, 50]]).expand(2, 2, 5).contiguous()
    summaries, expected = (torch.full((2, 2, 4, 48), 5.0, dtype=dtype) for _ in range(2))
    for op, to in ((ops.page_summaries, summaries), (page_summaries_reference, expected)):
        op(key, int32(0, 1), int32(4, 3), to, segment_offsets=offsets)
    torch.testing.assert_close(summaries, expected, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


QUERIES = [(1, 4, 2, 64), (1, 9, 3, 64), (1, 8, 1, 128), (5, 6, 2, 40), (40, 4, 2, 64), (3, 3, 3, 80), (20, 7, 1, 32)]
SCORES = [{}, {"per_token": True}, {"reduce": "sum"}, {"normalize": True, "scale": 0.1}]


@pytest.mark.parametrize("options", SCORES, ids=str)
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("shape", QUERIES, ids=str)
@pytest.mark.parametrize("eight", [False, True], ids=["", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_score_pages(dtype, eight, shape, width, options, isa):
    T, Hq, Hkv, D = shape
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, T, Hq, D, generator=g).to(dtype).transpose(1, 2)
    ends = torch.randn(2, Hkv, 150, width, D, generator=g).to(dtype)
    if eight:
        ends = ends.masked_fill(ends.abs() < 2**-6, 0).to(E4M3).to(dtype)
    summaries = ends.sort(-2, descending=True).values.flatten(-2).to(E4M3 if eight else dtype)
    scores = ops.score_pages(query, summaries, int32(150, 67), **options)
    exact = score_pages_reference(query, summaries, int32(150, 67), **options)
    size = float(exact[exact.isfinite()].abs().max().clamp(min=1))
    torch.testing.assert_close(scores.double(), exact, atol=2e-6 * size, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 7])
def test_every_e4m3_value_counts_and_those_below_their_least_exponent_may_count_as_0(T, isa):
    values = torch.arange(256).to(torch.uint8).view(E4M3)
    values = values[values.float().isfinite()]  # [254]
    for dtype in DTYPES:
        query = torch.full((1, 2, T, 2), 1.0, dtype=dtype)
        query[..., 1] = 0
        summaries = torch.stack([values, values], -1).view(1, 1, -1, 2)
        scores = ops.score_pages(query, summaries, int32(len(values)))[0, 0, 0]
        small, close = values.float().abs() < 2**-6, (scores / values.float() - 1).abs() < 1e-6
        assert close[~small].all() and (close | (scores == 0))[small].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_bound_holds_for_every_key_and_is_met_by_a_page_of_one(dtype):
    g = torch.Generator().manual_seed(0)
    key = (torch.randn(1, 2, 160, 64, generator=g) * 3).to(dtype)
    query = torch.randn(1, 6, 1, 64, generator=g).to(dtype)
    products = (query.double().view(1, 2, 3, 64) @ key.double().mT).amax(2)
    for page_size in (1, 16):
        pages = 160 // page_size
        summaries = torch.empty(1, 2, pages, 128, dtype=dtype)
        ops.page_summaries(key, int32(0), int32(160), summaries, page_size)
        bound = ops.score_pages(query, summaries, int32(pages))[:, 0].double()
        best = products.view(1, 2, pages, page_size).amax(-1)
        assert (bound >= best - 1e-4).all()
        if page_size == 1:
            torch.testing.assert_close(bound, best, atol=1e-4, rtol=1e-5)


def test_a_planted_needle_is_found_in_every_page():
    g = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 1, 64, generator=g)
    for page in range(20):
        key = torch.randn(1, 2, 320, 64, generator=g)
        key[0, :, page * 16 + 5] += 3 * query.view(2, 2, 64).mean(1)
        summaries = torch.empty(1, 2, 20, 128)
        ops.page_summaries(key, int32(0), int32(320), summaries, 16)
        scores = ops.score_pages(query, summaries, int32(20))
        indices, _ = ops.select_pages(scores, int32([20]), int32([20]), 1)
        assert (indices == page).all()


MASSES = [
    {},
    {"reduce": "max"},
    {"per_query_head": True},
    {"per_query_head": True, "per_token": True},
    {"per_token": True, "reduce": "max"},
    {"weights": True},
    {"softcap": 3.0, "scale": 0.3},
]


@pytest.mark.parametrize("options", MASSES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 9, 3, 64), (1, 6, 3, 128), (32, 6, 3, 40), (70, 3, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_attention_mass(dtype, shape, layout, options, isa):
    T, Hq, Hkv, D = shape
    key, _, table = cache_of(2, Hkv, D, 400, dtype, layout)
    query = torch.randn(2, T, Hq, D, generator=torch.Generator().manual_seed(5)).to(dtype).transpose(1, 2)
    lens = lens_of(layout, 310, 64)
    if "weights" in options:
        options = {"weights": torch.rand(2, T, generator=torch.Generator().manual_seed(6)).contiguous()}
    mass = ops.attention_mass(query, key, lens, page_table=table, **options)
    exact = attention_mass_reference(query, key, lens, page_table=table, **options)
    torch.testing.assert_close(mass.double(), exact, atol=1e-5, rtol=1e-5)


def test_mass_of_a_window_adds_up_and_takes_a_known_lse():
    inputs = attention_cases.make(Case(B=2, T=20, Hq=6, Hkv=2, prefix=400, tree=False), torch.float32)
    query, key, value, seq_lens, _ = inputs.args
    mass = ops.attention_mass(query, key, seq_lens, per_query_head=True)
    torch.testing.assert_close(mass.sum(-1)[:, 0], torch.full((2, 6), 20.0), atol=1e-3, rtol=0)
    lse = ops.tree_attention(query, key, value, seq_lens)[1]
    given = ops.attention_mass(query, key, seq_lens, lse=lse, per_query_head=True)
    torch.testing.assert_close(given, mass, atol=1e-5, rtol=0)


def assert_same_lists(got, expected):
    assert torch.equal(got[1], expected[1])
    K = min(got[0].shape[-1], expected[0].shape[-1])
    assert torch.equal(got[0][..., :K], expected[0][..., :K])


BUDGETS = [(1, 1, 0), (40, 7, 0), (40, 7, 2), (3000, 128, 4), (64, 100, 1), (500, 0, 0), (70, 3, 5)]


@pytest.mark.parametrize("N, budget, sinks", BUDGETS)
@pytest.mark.parametrize("kind", ["normal", "ties", "special", "nan", "tiny"])
def test_select_pages(kind, N, budget, sinks, isa):
    g = torch.Generator().manual_seed(N)
    scores = torch.randn(2, 3, 2, N, generator=g)
    if kind == "ties":
        scores = scores.round()
    if kind == "special":
        scores[..., ::3], scores[..., 1::5], scores[..., 2::7] = -math.inf, math.nan, math.inf
    if kind == "nan":
        scores[scores > -2] = math.nan
    if kind == "tiny":  # denormal, and zeros of both signs
        scores *= 1e-44
    pages = torch.randint(N // 2, N + 1, (2, 3), generator=g, dtype=torch.int32)
    scored = (pages - torch.tensor([0, 1, 9])).clamp(min=0).int().contiguous()
    if kind == "normal":  # every list its own
        budget = torch.randint(0, budget + 1, (2, 3, 2), generator=g, dtype=torch.int32)
    got = ops.select_pages(scores, pages, scored, budget, num_sinks=sinks)
    assert_same_lists(got, select_pages_reference(scores, pages, scored, budget, num_sinks=sinks))


@pytest.mark.parametrize("budget", [0, 1, 17, 60, 500])
def test_select_slots(budget):
    g = torch.Generator().manual_seed(budget)
    scores = torch.randn(2, 3, 2, 12, generator=g)
    scores[:, :, :, 4] = -math.inf
    scores[:, 0, :, 5] = scores[:, 0, :, 6]
    offsets = torch.randint(0, 9, (2, 2, 13), generator=g).cumsum(-1).int()
    segments = int32([12, 7, 0], [12, 7, 0])
    got = ops.select_slots(scores, offsets, segments, budget)
    assert_same_lists(got, select_slots_reference(scores, offsets, segments, budget))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_evict_kv(dtype, layout, heads):
    g = torch.Generator().manual_seed(0)
    *caches, table = cache_of(2, 3, 40, 100, dtype, layout)
    expected = [c.clone() for c in caches]
    keep = torch.rand(2, heads, 100, generator=g).argsort(-1)[..., :60].sort(-1).values.int().contiguous()
    counts = torch.randint(0, 61, (2, heads), generator=g, dtype=torch.int32)
    ops.evict_kv(*caches, keep, counts, table)
    evict_kv_reference(*expected, keep, counts, table)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_rerotate_keys(dtype, layout, isa):
    key, _, table = cache_of(2, 3, 40, 60, dtype, layout)
    expected, before = key.clone(), key.clone()
    inv_freq = 1e4 ** -(torch.arange(0, 32, 2) / 32)  # a part of the head dim
    begin, end = lens_of(layout, 2, 0), lens_of(layout, 50, 9)
    shift = torch.tensor([-300, 17])
    ops.rerotate_keys(key, begin, end, shift, inv_freq, table)
    rerotate_keys_reference(expected, begin, end, shift, inv_freq, table)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(key, expected, atol=1e-6, rtol=2 * eps)
    ops.rerotate_keys(key, begin, end, -shift, inv_freq, table)
    torch.testing.assert_close(key, before, atol=4 * eps, rtol=4 * eps)


def bad_calls():
    key, value, _ = cache_of(1, 2, 8, 20, torch.float32)
    query, scores = torch.zeros(1, 4, 1, 8), torch.zeros(1, 1, 1, 5)
    summaries = torch.zeros(1, 2, 4, 16)
    odd = summaries[..., :9].contiguous()
    yield "summaries has room for N = 4", lambda: ops.page_summaries(key, int32(0), int32(20), summaries, 4)
    yield "page_size must be at least 1, got 0", lambda: ops.page_summaries(key, int32(0), int32(20), summaries)
    yield r"summaries.size\(3\) must be D", lambda: ops.page_summaries(key, int32(0), int32(9), odd, 4)
    yield r"end\[0\] = 21", lambda: ops.page_summaries(key, int32(0), int32(21), summaries, 8)
    yield (
        "summaries must be float32 or float8_e4m3fn, got float16",
        lambda: ops.page_summaries(key, int32(0), int32(9), summaries.half(), 8),
    )
    yield (
        "summaries must be float32 or float8_e4m3fn, got bfloat16",
        lambda: ops.score_pages(query, summaries.bfloat16(), int32(4)),
    )
    yield r"num_pages\[0\] = 5", lambda: ops.score_pages(query, summaries, int32(5))
    yield "multiple of the KV heads", lambda: ops.score_pages(query[:, :3], summaries, int32(4))
    yield "must be D or 2 D", lambda: ops.score_pages(query, odd, int32(4))
    yield r"seq_lens\[0\] = 20 plus 1", lambda: ops.attention_mass(query, key, int32(20))
    yield r"weights\[0, 0\] = -1", lambda: ops.attention_mass(query, key, int32(5), weights=-torch.ones(1, 1))
    yield r"lse.size\(2\)", lambda: ops.attention_mass(query, key, int32(5), lse=torch.zeros(1, 4, 2))
    yield r"num_pages\[0, 0\] = 6", lambda: ops.select_pages(scores, int32([6]), int32([2]), 1)
    yield r"num_scored\[0, 0\] = 3 must", lambda: ops.select_pages(scores, int32([2]), int32([3]), 1)
    yield r"budgets\[0, 0, 0\] = -1", lambda: ops.select_pages(scores, int32([2]), int32([1]), -1)
    yield "must ascend from 0", lambda: ops.select_slots(scores, int32([[0, 3, 2, 4, 5, 6]]), int32([5]), 3)
    yield r"keep\[0, 0, 1\] = 3", lambda: ops.evict_kv(key, value, int32([[5, 3]]), int32([2]))
    yield r"keep\[0, 0, 0\] = 20", lambda: ops.evict_kv(key, value, int32([[20, 3]]), int32([1]))
    yield r"counts\[0, 0\] = 3", lambda: ops.evict_kv(key, value, int32([[1, 3]]), int32([3]))
    many = torch.ones(5)
    yield "at most half of D = 8", lambda: ops.rerotate_keys(key, int32(0), int32(2), torch.tensor([1]), many)


@pytest.mark.parametrize("message, call", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_refuses_unknown_reductions():
    with pytest.raises(ValueError, match="reduce must be 'sum' or 'max', got 'mean'"):
        ops.score_pages(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8), int32(1), reduce="mean")


def test_opcheck():
    key, value, table = cache_of(2, 3, 16, 40, torch.float32, "head_pages")
    query, lens = torch.randn(2, 6, 2, 16), lens_of("head_pages", 30, 11)
    summaries, scores = torch.zeros(2, 3, 9, 32), torch.randn(2, 1, 3, 9)
    check, branchwise = torch.library.opcheck, torch.ops.branchwise
    check(branchwise.page_summaries, (key, lens * 0, lens, summaries, 8, None, table))
    check(branchwise.score_pages, (query, summaries, int32(5, 3), 1, True))
    check(branchwise.attention_mass, (query, key, lens, None, None, table, 1, False, True))
    check(branchwise.evict_kv, (key, value, int32([[1, 4]], [[0, 9]]), int32([2], [1]), table))
    check(branchwise.rerotate_keys, (key, lens * 0, lens, torch.tensor([3, -2]), torch.ones(4), table))
    # The width of a list depends on the data, which the other checks don't expect.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    budgets = int32([[2, 3, 0]], [[1, 1, 1]])
    check(branchwise.select_pages, (scores, int32([9], [3]), int32([8], [3]), budgets), test_utils=tests)
    offsets = torch.arange(10, dtype=torch.int32).expand(2, 3, 10).contiguous()
    check(branchwise.select_slots, (scores, offsets, int32([9], [3]), 2), test_utils=tests)
