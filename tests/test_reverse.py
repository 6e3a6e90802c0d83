"""ReverseSpeculative against its closed-form law, its limits, and itself one token at a time."""

from __future__ import annotations

import json

import pytest
import torch

import branchwise as bw
import tiny
from branchwise.decoding.reverse import FALLBACK, ReverseSpeculative, Trace, write_traces
from test_big_little import sharp
from test_diffusion import Streamer

V = 128


def decode(student, decoder, ids, mask=None, new=12, **options):
    return student.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new,
        do_sample=False,
        custom_generate=decoder,
        **{"eos_token_id": None, "pad_token_id": 0, **options},
    )


def prompt(n=9):
    return torch.randint(3, 120, (1, n), generator=torch.Generator().manual_seed(4))


def law(teacher, student, ids, floor, trials, top_k, temperature, top_p):
    """f64[V] by the formula of the card, from logits alone."""

    def top(logits):
        p = torch.zeros(V, dtype=torch.float64)
        order = sorted(range(V), key=lambda i: (-float(logits[i]), i))[:top_k]
        values = (logits[order] / temperature).softmax(0)
        total = 0.0
        for i, share in zip(order, values.tolist(), strict=True):
            if total < top_p:
                p[i] = share
            total += share
        return p / p.sum(), order

    with torch.no_grad():
        t, s = (m(ids).logits[0, -1].double() for m in (teacher, student))
    (T, _), (S, order) = top(t), top(s)
    raw = s.softmax(0)
    A = torch.zeros(V, dtype=torch.bool)
    A[[i for i in order if raw[i] >= floor]] = True
    a = float(T[A].sum())
    first = torch.where(A, T * (1 - (1 - a) ** trials) / a, 0) if a else torch.zeros(V).double()
    return first + (1 - a) ** trials * S


@pytest.mark.parametrize("trials", [1, 2, 5])
@pytest.mark.parametrize("floor, top_k, temperature, top_p", [(0.05, 6, 1.5, 1.0), (0.02, 12, 6.0, 0.8)])
def test_the_law(floor, top_k, temperature, top_p, trials):
    """Chi-square of 6000 rows with the same prompt, which are numbered and so have noise of their own."""
    teacher, student = sharp()
    ids, n = prompt(), 6000
    options = (floor, trials, top_k, temperature, top_p)
    expected = n * law(teacher, student, ids, *options)
    assert abs(float(expected.sum()) - n) < 1e-6
    out = decode(student, ReverseSpeculative(teacher, *options, seed=1), ids.expand(n, -1), new=1)[:, -1]
    seen = torch.bincount(out, minlength=V).double()
    assert not seen[expected == 0].any()
    few = (expected > 0) & (expected < 5)
    here = expected >= 5
    chi = float(((seen - expected)[here] ** 2 / expected[here]).sum())
    if few.any():
        chi += float((seen[few].sum() - expected[few].sum()) ** 2 / expected[few].sum())
    freedom = int(here.sum()) - 1 + bool(few.any())
    assert freedom >= 2 and chi < freedom + 4.5 * (2 * freedom) ** 0.5 + 6


def test_a_wrong_law_is_noticed():
    """The same statistic with the rule of another number of trials."""
    teacher, student = sharp()
    ids, n = prompt(), 6000
    expected = n * law(teacher, student, ids, 0.05, 1, 6, 1.5, 1.0)
    out = decode(student, ReverseSpeculative(teacher, 0.05, 5, 6, 1.5, 1.0, seed=1), ids.expand(n, -1), new=1)[:, -1]
    seen = torch.bincount(out, minlength=V).double()
    here = expected >= 5
    assert float(((seen - expected)[here] ** 2 / expected[here]).sum()) > 100


@pytest.mark.parametrize("trials", [1, 5])
def test_draft_lengths_change_nothing(trials):
    teacher, student = sharp()
    ids = torch.randint(3, 120, (3, 14), generator=torch.Generator().manual_seed(6))
    mask = (torch.arange(14) >= torch.tensor([[0], [5], [12]])).long()
    traces = {}
    for length in (1, 4, 16):
        decoder = ReverseSpeculative(teacher, 0.03, trials, 10, 1.2, 0.9, draft_length=length, seed=5)
        out = decode(student, decoder, ids * mask, mask, new=30)
        traces[length] = (out, decoder.traces)
        assert out.shape[1] == 44 and decoder.stats.emitted == 90
    for length in (4, 16):
        assert torch.equal(traces[length][0], traces[1][0])
        for a, b in zip(traces[length][1], traces[1][1], strict=True):
            assert a.tokens == b.tokens and a.trials == b.trials
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
    kinds = {trial for trace in traces[1][1] for trial in trace.trials}
    assert FALLBACK in kinds and 0 in kinds and (trials == 1 or kinds & {1, 2, 3, 4})
    for row in range(3):
        own = mask[row].bool()
        decoder = ReverseSpeculative(teacher, 0.03, trials, 10, 1.2, 0.9, seed=5)
        alone = decode(student, decoder, ids[row : row + 1, own], new=30)
        assert torch.equal(alone[0, -30:], traces[1][0][row, -30:])


def test_limits():
    """No floor: the teacher's text. A floor above 1: the student's, whoever the teacher is."""
    teacher, student = sharp()
    ids = prompt()
    free = ReverseSpeculative(teacher, 0.0, 1, V, 1.0, 1.0, seed=2)
    text = decode(student, free, ids, new=25)
    assert set(free.traces[0].trials) == {0}
    assert torch.equal(text, decode(teacher, ReverseSpeculative(teacher, 0.0, 1, V, 1.0, 1.0, seed=2), ids, new=25))
    strict = ReverseSpeculative(teacher, 1.1, 3, 10, 1.0, 1.0, seed=2)
    text = decode(student, strict, ids, new=25)
    assert set(strict.traces[0].trials) == {FALLBACK} and strict.traces[0].share_of_teacher == 0
    other = ReverseSpeculative(tiny.model("llama"), 1.1, 3, 10, 1.0, 1.0, seed=2)
    assert torch.equal(text, decode(student, other, ids, new=25))


def test_every_token_is_likely_or_flagged():
    teacher, student = sharp()
    ids = prompt()
    decoder = ReverseSpeculative(teacher, 0.05, 3, 8, 1.3, 1.0, seed=9)
    text = decode(student, decoder, ids, new=60)
    trace = decoder.traces[0]
    with torch.no_grad():
        p = student(text).logits[0].double().softmax(-1)
    for i, (token, trial, said) in enumerate(zip(trace.tokens, trace.trials, trace.probabilities, strict=True)):
        row = p[ids.shape[1] + i - 1]
        assert abs(float(row[token]) - said) < 1e-5
        assert int((row > row[token]).sum()) < 8
        assert trial == FALLBACK or said >= 0.05
    assert 0 < trace.share_of_teacher < 1


def test_ends_of_texts():
    teacher, student = sharp()
    ids = prompt()
    whole = decode(student, ReverseSpeculative(teacher, 0.03, 2, seed=3), ids, new=30)[0].tolist()
    end = whole[ids.shape[1] + 7]
    decoder = ReverseSpeculative(teacher, 0.03, 2, seed=3)
    text = decode(student, decoder, ids, new=30, eos_token_id=end)[0].tolist()
    assert text == whole[: whole.index(end, ids.shape[1]) + 1]
    assert decoder.traces[0].tokens == text[ids.shape[1] :]


def test_traces_are_written_as_a_data_set(tmp_path):
    from datasets import load_dataset

    teacher, student = sharp()
    decoder = bw.ReverseSpeculative(teacher, seed=1)
    decode(student, decoder, prompt().expand(2, -1), new=5)
    path = tmp_path / "traces.jsonl"
    write_traces(path, ["a", "b"], ["ä\n", "y"], decoder.traces)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [trace.tokens for trace in decoder.traces]
    assert lines[0]["text"] == "ä\n" and len(lines[1]["probabilities"]) == 5
    assert load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path)).num_rows == 2
    with pytest.raises(ValueError, match="zip"):
        write_traces(path, ["a"], ["b", "c"], [Trace()])


def test_refuses():
    teacher, _ = sharp()
    for message, options in {
        "trials must be at least 1, got 0": {"trials": 0},
        "top_k must be at least 1, got 0": {"top_k": 0},
        "draft_length must be at least 1, got 0": {"draft_length": 0},
        "temperature must be positive, got 0": {"temperature": 0},
        "top_p must lie in": {"top_p": 0},
        "floor must be at least 0, got -1": {"floor": -1},
    }.items():
        with pytest.raises(ValueError, match=message):
            ReverseSpeculative(teacher, **options)
    student, streamer = sharp()[1], Streamer()
    with pytest.raises(ValueError, match="it cannot use RepetitionPenaltyLogitsProcessor"):
        decode(student, ReverseSpeculative(teacher), prompt(), repetition_penalty=1.2)
    out = decode(student, ReverseSpeculative(teacher, seed=1), prompt(), new=5, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_cancelling_returns_what_there_is():
    teacher, student = sharp()
    monitor = bw.Monitor(progress=False)
    advance = monitor.advance
    monitor.advance = lambda tokens: (advance(tokens), monitor.cancel() if monitor.tokens >= 10 else None)
    ids = prompt()
    whole = decode(student, bw.ReverseSpeculative(teacher, draft_length=4, seed=1), ids, new=40)
    out = decode(student, bw.ReverseSpeculative(teacher, draft_length=4, seed=1, monitor=monitor), ids, new=40)
    said = out.shape[1] - ids.shape[1]
    assert 10 <= said < 40 and monitor.tokens == said and out[0].tolist() == whole[0, : out.shape[1]].tolist()
