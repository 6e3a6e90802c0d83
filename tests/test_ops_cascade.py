"""cascade_attention: the definition of tree_attention, rows that share pages in every way, and bits that no neighbour
changes."""

import dataclasses

import pytest
import torch

import attention_cases
from attention_cases import CASES, Case
from branchwise import ops
from branchwise.ops.attention import tree_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PAGED = [
    dataclasses.replace(case, page_size={0: 16, 5: 4, 6: 8, 7: 32}.get(case.page_size, case.page_size))
    for case in CASES
]


def error(actual, exact):
    return (actual.double() - exact).abs().max().item()


def check(out, lse, args, options, dtype):
    exact, exact_lse = tree_attention_reference(*args, **options)
    plain, _ = tree_attention_reference(*args, **options, dtype=dtype)
    floor = (exact.to(dtype).double() - exact).abs().max().item()
    assert error(out, exact) <= 2 * error(plain, exact) + floor + 1e-6
    assert error(lse, exact_lse) <= 2e-6 * max(10.0, exact_lse.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_matches_definition(case, dtype, isa):
    inputs = attention_cases.make(case, dtype)
    query, key, value, seq_lens, mask = inputs.args
    options = dict(inputs.options)
    out, lse = ops.cascade_attention(query, key, value, seq_lens, options.pop("page_table"), mask, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    check(out, lse, inputs.args, inputs.options, dtype)


def forest(lengths_shared, tails, T, page_size, Hq, Hkv, D, dtype, seed=0, **options):
    """Rows that share their first slots: row b shares ``lengths_shared[b][j]`` slots with row j < b, in whole pages."""
    g = torch.Generator().manual_seed(seed)
    B = len(tails)
    width = -(-(max(tails) + T) // page_size)
    table = torch.full((B, width), -1, dtype=torch.int32)
    pages = 0
    for b in range(B):
        source, shared = lengths_shared[b]
        whole = min(shared, tails[b]) // page_size if source < b else 0
        table[b, :whole] = table[source, :whole]
        needed = -(-(tails[b] + T) // page_size) - whole
        table[b, whole : whole + needed] = torch.arange(pages, pages + needed, dtype=torch.int32)
        pages += needed
    order = torch.randperm(pages, generator=g).int()
    table = torch.where(table >= 0, order[table.clamp(min=0).long()], -1)
    key, value = (torch.randn(pages, Hkv, page_size, D, generator=g).to(dtype) for _ in range(2))
    query = torch.randn(B, T, Hq, D, generator=g).to(dtype).transpose(1, 2)
    mask = ops.build_tree(attention_cases.random_parents(B, T, g), torch.tensor(tails, dtype=torch.int32))[0]
    args = query, key, value, torch.tensor(tails, dtype=torch.int32), mask
    return args, {"page_table": table, **options}


ONE_PREFIX = [(0, 1100)] * 20, [1100 + 7 * b for b in range(20)]
GROUPS = (
    [(0, 0), (0, 600), (1, 900), (0, 512), (0, 0), (4, 2000), (4, 256), (6, 511)],
    [
        700,
        1300,
        905,
        600,
        2100,
        2000,
        700,
        600,
    ],
)
FORESTS = {
    "one prefix, one token": dict(rows=ONE_PREFIX, T=1, page_size=16, Hq=9, Hkv=3, D=64),
    "one prefix, many rows a unit": dict(rows=ONE_PREFIX, T=9, page_size=32, Hq=8, Hkv=2, D=36),
    "groups of groups": dict(rows=GROUPS, T=1, page_size=64, Hq=4, Hkv=1, D=128),
    "groups, trees": dict(rows=GROUPS, T=6, page_size=16, Hq=6, Hkv=2, D=64),
    "a row's tokens in several blocks": dict(rows=GROUPS, T=210, page_size=128, Hq=4, Hkv=2, D=32),
    "window": dict(rows=ONE_PREFIX, T=5, page_size=16, Hq=4, Hkv=2, D=64, window=300),
    "window of one": dict(rows=GROUPS, T=1, page_size=16, Hq=4, Hkv=2, D=64, window=1),
    "all options": dict(rows=GROUPS, T=3, page_size=16, Hq=4, Hkv=2, D=64, window=700, softcap=5.0, scale=-0.3),
}


def make_forest(name, dtype):
    case = dict(FORESTS[name])
    return forest(*case.pop("rows"), dtype=dtype, **case)


def cascade(args, options, rows=slice(None)):
    query, key, value, seq_lens, mask = args
    options = dict(options)
    table = options.pop("page_table")[rows]
    return ops.cascade_attention(query[rows], key, value, seq_lens[rows], table, mask[rows], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("name", FORESTS)
def test_shared_pages(name, dtype, isa):
    """The definition; and every row bit for bit as alone, as among half of the others, and as with pages of its own."""
    args, options = make_forest(name, dtype)
    out, lse = cascade(args, options)
    check(out, lse, args, options, dtype)
    B = len(out)
    for b in range(B):
        alone, alone_lse = cascade(args, options, slice(b, b + 1))
        assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])
    half = torch.randperm(B, generator=torch.Generator().manual_seed(1))[: B // 2]
    some, _ = cascade(args, options, half)
    assert torch.equal(some, out[half])
    query, key, value, seq_lens, mask = args
    table = options["page_table"]
    own = torch.arange(table.numel(), dtype=torch.int32).view(table.shape)
    copied = [cache[table.clamp(min=0).long()].flatten(0, 1) for cache in (key, value)]
    apart, _ = cascade((query, *copied, seq_lens, mask), {**options, "page_table": own})
    assert torch.equal(apart, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("name", FORESTS)
def test_bit_equal_for_any_thread_count(name, dtype, threads):
    args, options = make_forest(name, dtype)
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(cascade(args, options))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_rows_of_one_text_get_the_same_bits(isa):
    args, options = forest([(0, 999)] * 5, [999] * 5, 1, 16, 9, 3, 64, torch.float32)
    query = args[0][:1].expand(5, -1, -1, -1)
    table = options["page_table"]
    table[1:, -1] = table[0, -1]  # the new token's page, too
    out, _ = cascade((query, *args[1:]), options)
    assert all(torch.equal(row, out[0]) for row in out[1:])


def test_no_rows():
    cache = torch.zeros(1, 2, 16, 32)
    none = torch.zeros(0, dtype=torch.int32)
    out, lse = ops.cascade_attention(torch.zeros(0, 4, 3, 32), cache, cache, none, none.view(0, 1))
    assert out.shape == (0, 4, 3, 32) and lse.shape == (0, 4, 3)


table = torch.zeros(2, 9, dtype=torch.int32)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("page_table must have shape", {"page_table": torch.zeros(2, 2, 4, dtype=torch.int32)}),
        ("seq_lens must have shape", {"seq_lens": torch.zeros(2, 2, dtype=torch.int32)}),
        ("page_table must be int32", {"page_table": torch.zeros(2, 4)}),
        (
            r"page size, key_cache.size\(2\) = 7, must divide 256",
            {"key_cache": (cache := torch.zeros(9, 2, 7, 64)), "value_cache": cache, "page_table": table},
        ),
        (r"page_table\[1, 0\] = 99", {"page_table": torch.tensor([[0, 1], [99, 2]], dtype=torch.int32)}),
        (r"seq_lens\[0\] = 1000 plus 3 new", {"seq_lens": torch.tensor([1000, 3], dtype=torch.int32)}),
        ("window must be 0", {"window": -1}),
        ("softcap must be 0", {"softcap": float("nan")}),
        ("no gradient", {"query": torch.zeros(2, 4, 3, 64, requires_grad=True)}),
    ],
)
def test_refuses(message, changes):
    inputs = attention_cases.make(Case(B=2, T=3, prefix=20, page_size=16), torch.float32)
    names = ["query", "key_cache", "value_cache", "seq_lens", "tree_mask"]
    with pytest.raises(RuntimeError, match=message):
        ops.cascade_attention(**{**dict(zip(names, inputs.args, strict=True)), **inputs.options, **changes})


def test_opcheck():
    (query, key, value, lens, mask), options = make_forest("all options", torch.float32)
    arguments = query, key, value, lens, options.pop("page_table"), mask
    torch.library.opcheck(torch.ops.branchwise.cascade_attention, arguments, options)
