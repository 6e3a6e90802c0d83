"""sparse_attention against its fp64 definition, on every instruction set, and against dense attention."""

import math

import pytest
import torch

import attention_cases
import sparse_cases
from attention_cases import Case
from branchwise import ops
from branchwise.ops.sparse import ALL, sparse_attention_reference
from sparse_cases import CASES, Sparse
from test_ops_attention import DTYPES, SHORT, error


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("sparse", CASES, ids=str)
def test_matches_definition(sparse, dtype, isa):
    inputs = sparse_cases.make(sparse, dtype)
    out, lse = ops.sparse_attention(*inputs.args, **inputs.options)
    exact, exact_lse = sparse_attention_reference(*inputs.args, **inputs.options)
    plain, _ = sparse_attention_reference(*inputs.args, **inputs.options, dtype=dtype)
    floor = (exact.to(dtype).double() - exact).abs().max().item()
    assert error(out, exact) <= 2 * error(plain, exact) + floor + 1e-6
    assert error(lse, exact_lse) <= 2e-6 * max(10.0, exact_lse.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("sparse", [CASES[1], CASES[8], CASES[11], CASES[14]], ids=str)
def test_bit_equal_for_any_thread_count(sparse, dtype, threads):
    inputs = sparse_cases.make(sparse, dtype)
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(ops.sparse_attention(*inputs.args, **inputs.options))
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)


@pytest.mark.parametrize("sparse", [CASES[1], CASES[11], CASES[14]], ids=str)
def test_bit_equal_for_any_batch(sparse):
    inputs = sparse_cases.make(sparse, torch.bfloat16)
    out, lse = ops.sparse_attention(*inputs.args, **inputs.options)
    for b in range(sparse.case.B):
        row = slice(b, b + 1)
        ragged = ("indices", "counts", "tree_mask", "segment_offsets")
        options = {k: v[row] if k in ragged and v is not None else v for k, v in inputs.options.items()}
        alone, alone_lse = ops.sparse_attention(*(x[row] for x in inputs.args), **options)
        assert torch.equal(alone, out[row]) and torch.equal(alone_lse, lse[row])


@pytest.mark.parametrize("case", [Case(T=1, B=3), Case(T=20, B=3, page_size=16), Case(T=1, Hq=8, D=128)], ids=str)
@pytest.mark.parametrize("unit", [1, 16])
def test_everything_listed_is_dense(case, unit):
    inputs = attention_cases.make(case, torch.float32)
    seq_lens = inputs.args[3]
    units = -(-int(seq_lens.max()) // unit)
    indices = torch.arange(units, dtype=torch.int32).expand(case.B, 1, units).contiguous()
    counts = -(-seq_lens // unit)[:, None].int().contiguous()
    options = {k: v for k, v in inputs.options.items() if k != "window"} | {"tree_mask": inputs.args[4]}
    dense = ops.tree_attention(*inputs.args, **inputs.options)
    sparse = ops.sparse_attention(*inputs.args[:4], indices, counts, unit=unit, **options)
    assert torch.equal(dense[0], sparse[0]) and torch.equal(dense[1], sparse[1])
    full = torch.full((case.Hkv,), ALL, dtype=torch.int32)
    ranged = ops.sparse_attention(*inputs.args[:4], sink_sizes=full * 0, recent_sizes=full, **options)
    assert torch.equal(dense[0], ranged[0]) and torch.equal(dense[1], ranged[1])


@pytest.mark.parametrize("T", [1, 5, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_dense_attention_with_lengths_and_pages_per_head(dtype, T):
    """Every KV head of a row is like a row of its own."""
    inputs = sparse_cases.make(Sparse(Case(B=2, T=T, Hq=6, Hkv=3, page_size=8), head_pages=True), dtype)
    query, key, value, lens = inputs.args
    table, mask = inputs.options["page_table"], inputs.options["tree_mask"]
    out, lse = ops.tree_attention(query, key, value, lens, mask, page_table=table)
    rows = query.reshape(2, 3, 2, T, 64).flatten(0, 1)
    alone = ops.tree_attention(
        rows, key, value, lens.flatten(), mask.repeat_interleave(3, 0), page_table=table.flatten(0, 1)
    )
    torch.testing.assert_close(out.view_as(alone[0]), alone[0], atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse.view_as(alone[1]), alone[1], atol=1e-5, rtol=1e-6)


def test_probabilities_add_up():
    """exp(lse of a set - lse of all) is the set's probability; those of a set and its complement add up to one."""
    inputs = attention_cases.make(Case(T=1, Hq=4, Hkv=1, prefix=300, tree=False), torch.float32)
    query, key, value, seq_lens, _ = inputs.args
    dense = ops.tree_attention(query, key, value, seq_lens)[1]
    own = ops.tree_attention(query, key[:, :, 300:], value[:, :, 300:], seq_lens * 0)[1]
    parts = [torch.arange(0, 300, 2, dtype=torch.int32), torch.arange(1, 300, 2, dtype=torch.int32)]
    total = -(own - dense).exp()  # the token itself is in both
    for part in parts:
        lse = ops.sparse_attention(
            query, key, value, seq_lens, part.view(1, 1, -1), torch.tensor([[len(part)]], dtype=torch.int32)
        )[1]
        assert (lse <= dense + 1e-6).all()
        total += (lse - dense).exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


def committed(options, b, h, t, P):
    """The slots below P that token t of a row sees through a head."""
    units = options["indices"][b, t, h, : options["counts"][b, t, h]].tolist()
    return [slot for i in units for slot in range(i * options["unit"], (i + 1) * options["unit"]) if slot < P]


@pytest.mark.parametrize("T", [1, 12])
def test_tokens_with_lists_of_their_own_equal_one_at_a_time(T):
    """Every node of a chain under its own list gives what the tokens give one by one, the ones before committed."""
    sparse = Sparse(Case(B=2, T=T, Hq=6, Hkv=2, tree=False, prefix=200), "token", unit=16)
    inputs = sparse_cases.make(sparse, torch.float32)
    query, key, value, seq_lens = inputs.args
    out, _ = ops.sparse_attention(*inputs.args, **inputs.options)
    for t in range(T):
        for b, P in enumerate(seq_lens.tolist()):
            lists = [committed(inputs.options, b, h, t, P) + list(range(P, P + t)) for h in range(2)]
            K = max(len(one) for one in lists) + 1
            indices = torch.tensor([[one + [-1] * (K - len(one)) for one in lists]], dtype=torch.int32)
            counts = torch.tensor([[len(one) for one in lists]], dtype=torch.int32)
            row, lens = slice(b, b + 1), torch.tensor([P + t], dtype=torch.int32)
            alone, _ = ops.sparse_attention(query[row, :, t : t + 1], key[row], value[row], lens, indices, counts)
            torch.testing.assert_close(alone[0, :, 0], out[b, :, t], atol=1e-5, rtol=1e-5)


def test_reads_only_what_is_visible():
    """Pages without a visible slot may hold NaN, or be missing."""
    sparse = Sparse(Case(B=2, T=3, page_size=16, prefix=300), "head", unit=16, ranges=True)
    inputs = sparse_cases.make(sparse, torch.float32)
    _, key, value, seq_lens = inputs.args
    options = inputs.options
    options["sink_sizes"] = torch.tensor([4, 16], dtype=torch.int32)
    options["recent_sizes"] = torch.tensor([30, 100], dtype=torch.int32)
    clean = ops.sparse_attention(*inputs.args, **options)[0]
    unseen = []
    for b in range(2):
        listed = {int(i) for h in range(2) for i in options["indices"][b, h, : options["counts"][b, h]]}
        unseen += [(b, n) for n in range(1, (int(seq_lens[b]) - 100) // 16) if n not in listed]
    assert len(unseen) > 5
    table = options["page_table"]
    for b, n in unseen:
        key[table[b, n]] = value[table[b, n]] = math.nan
    assert torch.equal(ops.sparse_attention(*inputs.args, **options)[0], clean)
    for b, n in unseen:
        table[b, n] = -1
    assert torch.equal(ops.sparse_attention(*inputs.args, **options)[0], clean)


def bad_calls():
    def call(**changes):
        inputs = sparse_cases.make(Sparse(Case(B=2, T=3, prefix=20, page_size=4), "head", unit=4), torch.float32)
        return ops.sparse_attention(*inputs.args, **{**inputs.options, **changes})

    def lists(*values):
        rows = torch.tensor([[list(values)] * 2] * 2, dtype=torch.int32)
        return {"indices": rows, "counts": torch.full((2, 2), len(values), dtype=torch.int32)}

    yield "indices or sink_sizes must be given", lambda: call(indices=None, counts=None)
    yield "indices and counts must be given together", lambda: call(counts=None)
    yield "must ascend", lambda: call(**lists(1, 0))
    yield "must ascend", lambda: call(**lists(1, 1))
    yield "go from -1 to 2 and must lie between 0 and", lambda: call(**lists(-1, 2))
    yield "go from 0 to 9 and must lie between 0 and", lambda: call(**lists(0, 9))
    yield (
        "counts of row 1, list 1 = 99",
        lambda: call(**{**lists(0), "counts": torch.tensor([[1, 1], [1, 99]], dtype=torch.int32)}),
    )
    yield "indices must be int32", lambda: call(indices=torch.zeros(2, 2, 3, dtype=torch.int64))
    yield "indices must have shape", lambda: call(indices=torch.zeros(2, 3, dtype=torch.int32))
    yield (
        "must be 1 or Hkv = 2",
        lambda: call(indices=torch.zeros(2, 3, 1, dtype=torch.int32), counts=torch.zeros(2, 3, dtype=torch.int32)),
    )
    yield "unit must be at least 1, got 0", lambda: call(unit=0)
    yield "unit must be 1 with segment_offsets", lambda: call(segment_offsets=torch.zeros(2, 2, 4, dtype=torch.int32))
    yield (
        "segment 0 go from 0 to 99",
        lambda: call(**lists(0), unit=1, segment_offsets=torch.tensor([[[0, 99]] * 2] * 2, dtype=torch.int32)),
    )
    yield (
        "sink_sizes and recent_sizes must be given together",
        lambda: call(sink_sizes=torch.zeros(2, dtype=torch.int32)),
    )
    negative = torch.tensor([1, -1], dtype=torch.int32)
    yield "recent_sizes\\[1\\] = -1", lambda: call(sink_sizes=negative.abs(), recent_sizes=negative)
    missing = torch.full((2, 6), -1, dtype=torch.int32)
    yield "page_table\\[0, 0\\] = -1", lambda: call(**lists(0), page_table=missing)
    yield "page_table must have shape \\[B, N\\] or", lambda: call(page_table=missing[0])


@pytest.mark.parametrize("message, call", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("sparse", [CASES[1], CASES[13], CASES[16]], ids=str)
def test_opcheck(sparse):
    inputs = sparse_cases.make(sparse, torch.float32)
    torch.library.opcheck(torch.ops.branchwise.sparse_attention, inputs.args, inputs.options)
