"""Summaries, scores, selections, eviction and re-rotation on CUDA: the CPU ops' own tests, run with these ops."""

import pytest
import torch

import test_ops_scores
from branchwise import ops
from branchwise.ops.scores import attention_mass_reference
from test_ops_scores import (
    LAYOUTS,
    MASSES,
    cache_of,
    int32,
    lens_of,
    test_every_e4m3_value_counts_and_those_below_their_least_exponent_may_count_as_0,  # noqa: F401
    test_evict_kv,  # noqa: F401
    test_page_summaries,  # noqa: F401
    test_rerotate_keys,  # noqa: F401
    test_segment_means,  # noqa: F401
    test_select_pages,  # noqa: F401
    test_select_slots,  # noqa: F401
    test_summaries_in_e4m3_are_rounded_as_torch_rounds,  # noqa: F401
    test_summaries_of_appends_and_roll_backs_equal_those_made_at_once,  # noqa: F401
)


@pytest.fixture(autouse=True)
def ops_of_the_device(device, monkeypatch):
    monkeypatch.setattr(test_ops_scores, "ops", device)


@pytest.fixture
def isa():
    """The CPU's instruction sets do not matter here."""


@pytest.mark.parametrize("options", test_ops_scores.SCORES, ids=str)
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("shape", [(1, 9, 3, 64), (5, 6, 2, 40), (3, 3, 3, 80)], ids=str)
@pytest.mark.parametrize("eight", [False, True], ids=["", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_pages(dtype, eight, shape, width, options):
    test_ops_scores.test_score_pages(dtype, eight, shape, width, options, None)


@pytest.mark.parametrize("options", MASSES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [1, 17])
def test_attention_mass(T, layout, options, device):
    dtype = torch.float16
    key, _, table = cache_of(2, 3, 40, 400, dtype, layout)
    query = torch.randn(2, T, 6, 40, generator=torch.Generator().manual_seed(5)).to(dtype).transpose(1, 2)
    lens = lens_of(layout, 310, 64)
    if "weights" in options:
        options = {"weights": torch.rand(2, T, generator=torch.Generator().manual_seed(6))}
    mass = device.attention_mass(query, key, lens, page_table=table, **options)
    exact = attention_mass_reference(query, key, lens, page_table=table, **options)
    torch.testing.assert_close(mass.double(), exact, atol=1e-5, rtol=1e-5)


def test_quest_round_equals_that_of_the_cpu(device):
    """Summaries, scores, selection and attention to what was selected, one after another."""
    key, value, table = cache_of(2, 2, 64, 400, torch.bfloat16, "paged", 16)
    query = torch.randn(2, 8, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    lens = int32(380, 123)
    pages = ((lens + 15) // 16).int()
    results = []
    for on in (ops, device):
        summaries = torch.zeros(2, 2, 25, 128, dtype=torch.bfloat16)
        on.page_summaries(key, int32(0, 0), lens, summaries, 16, page_table=table)
        scores = on.score_pages(query, summaries, pages)
        budgets = torch.full((2, 1, 2), 6, dtype=torch.int32)
        lists, counts = on.select_pages(scores, pages[:, None], pages[:, None] - 1, budgets, num_sinks=1)
        out, lse = on.sparse_attention(
            query, key, value, lens, lists[:, 0].contiguous(), counts[:, 0].contiguous(), unit=16, page_table=table
        )
        results.append((counts, out.float(), lse))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(results[0][2], results[1][2], atol=1e-3, rtol=0)


def test_slots_outside_the_cache_are_left_out(device):
    key, value, _ = cache_of(1, 1, 16, 20, torch.float32)
    before = key.clone()
    device.evict_kv(key, value, int32([[5, 99, -3, 30]]), int32([9]))
    device.rerotate_keys(key, int32(15), int32(500), torch.tensor([3]), torch.ones(4))
    assert key.isfinite().all() and torch.equal(key[:, :, 1:15], before[:, :, 1:15])
    counts = device.select_pages(torch.randn(1, 1, 1, 8), int32([100]), int32([-4]), int32([[7]]))[1]
    assert counts.tolist() == [[[8]]]
