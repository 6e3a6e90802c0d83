"""StepSpeculative against plain generation of either model, and against a loop that reads everything afresh at every
step."""

import pytest
import torch

import branchwise as bw
import tiny
from branchwise.attention import use_attention
from branchwise.cache import KVStore
from branchwise.decoding.step_scores import repeated_step
from branchwise.forward import StoredModel
from test_diffusion import Streamer

NEW = 40


def step_ends(step):
    """A step is over at a token that five divides, or after six tokens."""
    return len(step) >= 6 or int(step[-1]) % 5 == 0


def models():
    return tiny.model("llama"), tiny.model("qwen3")  # base, small


def generate(decoder, ids, mask=None, **options):
    return models()[0].generate(
        ids, attention_mask=mask, custom_generate=decoder, **{"max_new_tokens": NEW, "do_sample": False, **options}
    )


def judge(scores):
    """A scorer that gives these scores in turn."""
    scores = iter(scores)
    return lambda context, step: next(scores)


SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 30}


@pytest.mark.parametrize("drafter", [None, "none", "suffix"])
@pytest.mark.parametrize("options", [{}, SAMPLING, {"repetition_penalty": 1.3, "min_new_tokens": 20}], ids=str)
def test_limits(options, drafter):
    """Never accept, or always let the base model write: the base model's text. Always accept: the small one's."""
    base, small = models()
    ids, mask = tiny.prompts(3, 0)
    sampler = {"custom_generate": bw.PositionKeyedSampler(seed=9)} if options.get("do_sample") else {}
    plain = base.generate(ids, attention_mask=mask, max_new_tokens=NEW, **{"do_sample": False, **sampler, **options})
    for threshold, forced in ((10, 0), (0, 10**9)):
        decoder = bw.StepSpeculative(
            small, lambda c, s: 9.0, step_ends, threshold, first_base_steps=forced, drafter=drafter, seed=9
        )
        decoder.stop_rules = ()
        assert torch.equal(generate(decoder, ids, mask, **options), plain)
        assert all(trace.share_of_small == 0 for trace in decoder.traces)
    if options.get("do_sample"):  # the small model draws with the noise of row 1 of two equal prompts
        many = small.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, num_return_sequences=2, **sampler, **options
        )
        alone = many[1::2]
    else:
        alone = small.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
    decoder = bw.StepSpeculative(small, lambda c, s: 0.0, step_ends, -1, drafter=drafter, seed=9, stop_rules=())
    out = generate(decoder, ids, mask, **options)
    for ours, theirs in zip(out, alone, strict=True):
        n = min(len(ours), len(theirs))
        assert ours[:n].tolist() == theirs[:n].tolist() and not ours[n:].any() and not theirs[n:].any()
    assert all(trace.share_of_small == 1 for trace in decoder.traces)


def slow(base, small, prompt, pattern, closing=(), budget=10**9, rules=()):
    """The card's loop over token ids, greedy; every step begins with plain forwards over the whole text."""

    def step_of(model, text, most):
        step = []
        while len(step) < most:
            with torch.no_grad():
                step.append(int(model(torch.tensor([text + step])).logits[0, -1].argmax()))
            if step[-1] == 2 or step_ends(torch.tensor(step)):
                break
        return step

    text, events, steps = list(prompt), [], []
    pattern = iter(pattern)
    while len(text) < len(prompt) + NEW and text[-1] != 2:
        room = min(NEW - (len(text) - len(prompt)), budget - (len(text) - len(prompt)))
        if room <= 0 or (steps and any(rule(steps) for rule in rules)):
            text += closing
            events.append(("closing", len(closing)))
            break
        step = step_of(small, text, room)
        accepted = next(pattern)
        if not accepted:
            step = step_of(base, text, room)
        events.append(("small" if accepted else "base", len(step)))
        text += step
        steps.append(torch.tensor(step))
    rest = []
    while len(text) + len(rest) < len(prompt) + NEW and (text + rest)[-1] != 2:
        with torch.no_grad():
            rest.append(int(base(torch.tensor([text + rest])).logits[0, -1].argmax()))
    return text + rest, events + ([("base", len(rest))] if rest else [])


@pytest.mark.parametrize("drafter", [None, "none"])
@pytest.mark.parametrize("budget", [10**9, 17])
@pytest.mark.parametrize("pattern", [[1, 0, 0, 1], [0, 1], [1, 1, 1, 0]], ids=str)
def test_is_the_loop_of_the_card(pattern, budget, drafter):
    base, small = models()
    for seed in range(4):
        ids, _ = tiny.prompts(1, seed)
        closing = torch.tensor([7, 8])
        decoder = bw.StepSpeculative(
            small,
            judge(9.0 * accept for accept in pattern * 50),
            step_ends,
            closing=closing,
            budget=budget,
            drafter=drafter,
        )
        out = generate(decoder, ids)
        text, events = slow(base, small, ids[0].tolist(), pattern * 50, [7, 8], budget, [repeated_step])
        assert out[0].tolist() == text
        trace = decoder.traces[0]
        assert [(step["writer"], len(step["tokens"])) for step in trace.steps] == events
        assert trace.tokens == text[ids.shape[1] :] and len(trace.writers) == len(trace.tokens)
        assert trace.stopped in ("", "budget", "repeated_step")


class FixedLogProbability(bw.LogProbabilityScore):
    """Notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __call__(self, step, logits):
        self.asked.append((step.clone(), super().__call__(step, logits), logits.shape[0]))
        return self.asked[-1][1]


def test_log_probabilities_are_those_of_a_fresh_forward():
    base, small = models()
    ids, _ = tiny.prompts(1, 3)
    scorer = FixedLogProbability()
    decoder = bw.StepSpeculative(small, scorer, step_ends, threshold=-1e9, seed=0)
    generate(decoder, ids, **SAMPLING)
    decoder.threshold = sorted(score for _, score, _ in scorer.asked)[len(scorer.asked) // 2]
    scorer.asked.clear()
    generate(decoder, ids, **SAMPLING)
    context = ids[0].tolist()
    scored = [step for step in decoder.traces[0].steps if "score" in step]
    assert {step["writer"] for step in scored} == {"small", "base"}
    for event, (step, score, _) in zip(scored, scorer.asked, strict=True):
        assert step.tolist() == event.get("rejected", event["tokens"]) and score == event["score"]
        with torch.no_grad():
            logits = base(torch.tensor([context + step.tolist()])).logits[0, len(context) - 1 : -1]
        fresh = float(logits.log_softmax(-1)[range(len(step)), step].mean())
        assert score == pytest.approx(fresh, abs=1e-4)
        context += event["tokens"]


class Digits:
    """A tokenizer of numbers: the text "7 12" has two tokens, and digit d is token d + 20."""

    def encode(self, text, add_special_tokens=True):
        if len(text) == 1:
            return [int(text) + 20]
        return [int(word) for word in text.split()]


def test_judge_reads_the_step_and_its_suffix_only():
    """Marks are those of a fresh forward; per judge call the base model reads the step, the suffix and one token."""
    base, small = models()
    ids, _ = tiny.prompts(1, 3, longest=40)
    scorer = bw.JudgeScore(Digits(), "31 32 33 34 35", average=True, top=128)
    decoder = bw.StepSpeculative(small, scorer, step_ends, threshold=-1, seed=0)
    generate(decoder, ids, **SAMPLING)
    marks = sorted(step["score"] for step in decoder.traces[0].steps)
    decoder.threshold = marks[len(marks) // 2]
    read = []
    handle = base.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    generate(decoder, ids, **SAMPLING)
    handle.remove()
    context = ids[0].tolist()
    scored = [step for step in decoder.traces[0].steps if "score" in step]
    for tokens in read:  # what fills a forward up repeats its last token
        while tokens[-2:] == [35, 35]:
            tokens.pop()
    judged = [tokens for tokens in read if tokens[-5:] == [31, 32, 33, 34, 35]]
    assert {step["writer"] for step in scored} == {"small", "base"} and len(judged) == len(scored)
    for i, (event, tokens) in enumerate(zip(scored, judged, strict=True)):
        step = [token for token in event.get("rejected", event["tokens"]) if token != 2]
        assert tokens[-5 - len(step) : -5] == step
        if i > 0:
            assert len(tokens) <= len(step) + 5 + 1
        with torch.no_grad():
            logits = base(torch.tensor([context + step + [31, 32, 33, 34, 35]])).logits[0, -1]
        p = logits.softmax(-1)[20:30]
        assert event["score"] == pytest.approx(float((p * torch.arange(10)).sum() / p.sum()), abs=1e-3)
        context += event["tokens"]


def test_judge_takes_a_digit_or_nothing():
    logits = torch.zeros(1, 128)
    logits[0, 27] = 5.0
    judge = bw.JudgeScore(Digits(), "31 32")
    assert judge(torch.tensor([1]), logits) == 7.0
    logits[0, 99] = 6.0
    assert judge(torch.tensor([1]), logits) == 0.0
    average = bw.JudgeScore(Digits(), "31 32", average=True, top=2)
    assert average(torch.tensor([1]), logits) == pytest.approx(7.0)  # the only digit among the two likeliest


def test_both_models_keep_what_a_fresh_prefill_would_hold():
    """Over hundreds of accepted and rejected steps; no page leaks."""
    small = models()[1]
    ids, _ = tiny.prompts(1, 5)
    runs = []
    begin = bw.decoding.step_speculative._Row.__init__

    def noting(self, *args):
        begin(self, *args)
        runs.append(self)

    chance = torch.Generator().manual_seed(0)
    scorer = bw.LogProbabilityScore()
    plain = type(scorer).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bw.decoding.step_speculative._Row, "__init__", noting)
        patch.setattr(
            type(scorer),
            "__call__",
            lambda self, step, logits: (plain(self, step, logits), float(torch.rand((), generator=chance)))[1],
        )
        decoder = bw.StepSpeculative(small, scorer, step_ends, threshold=0.5, stop_rules=())
        decoder.seed = 3
        generate(decoder, ids, **SAMPLING, max_new_tokens=400, eos_token_id=None)
    run = runs[0]
    steps = decoder.traces[0].steps
    assert len(steps) > 100 and sum("rejected" in step for step in steps) > 30
    for branches, branch in ((run.base, run.root), (run.little, run.small)):
        text = branches.texts[branch]
        held = branches.tree.length(branch)
        assert len(text) - 8 <= held <= len(text)
        assert branches.tree.num_pages == -(-held // branches.tree.page_size)
        assert text.tolist() == ids[0].tolist() + decoder.traces[0].tokens
        fresh = StoredModel(branches.model, KVStore(1))
        with torch.no_grad(), use_attention(branches.model):
            fresh.extend([text[:held]])
        for layer in range(3):
            for ours, theirs in zip(branches.tree.branch(layer, branch), fresh.store.row(layer, 0), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        branches.prune([branch])
        assert branches.tree.num_pages == 0


def test_thinking_ends_at_its_mark_and_at_an_answer():
    small = models()[1]
    ids, _ = tiny.prompts(1, 1)

    class Names:
        def decode(self, tokens):
            return " ".join(map(str, tokens))

    free = bw.StepSpeculative(small, lambda c, s: 9.0, step_ends, stop_rules=())
    generate(free, ids)
    steps = free.traces[0].steps
    assert len(steps) > 3
    word = str(steps[2]["tokens"][-1])
    answer = bw.AnswerFound(Names(), [word])
    first = next(i for i, step in enumerate(steps) if word in Names().decode(step["tokens"]))
    decoder = bw.StepSpeculative(small, lambda c, s: 9.0, step_ends, stop_rules=[answer], closing=torch.tensor([9]))
    generate(decoder, ids)
    trace = decoder.traces[0]
    assert trace.stopped == "AnswerFound" and trace.steps[: first + 1] == steps[: first + 1]
    assert trace.steps[first + 1] == {"tokens": [9], "writer": "closing"}
    assert all(step["writer"] == "base" for step in trace.steps[first + 2 :])
    mark = steps[1]["tokens"][-1]
    decoder = bw.StepSpeculative(
        small, lambda c, s: 9.0, step_ends, thought=lambda said: mark in said.tolist(), stop_rules=()
    )
    generate(decoder, ids)
    assert decoder.traces[0].stopped == "" and decoder.traces[0].steps[-1]["writer"] == "base"
    assert {step["writer"] for step in decoder.traces[0].steps[:-1]} == {"small"}


def test_regenerated_steps_follow_the_base_model():
    """The first token of a step that was rejected because of what the small model drew: still the base model's law."""
    base, small = models()
    prompt = torch.tensor([[5, 9, 17, 4]])
    n = 600
    # Rejected where the small model's token is large: with shared noise that would bias the base model's token.
    decoder = bw.StepSpeculative(
        small,
        lambda c, s: 0.0 if int(s[0]) > 40 else 9.0,
        lambda step: True,
        drafter="none",
        seed=range(n),
        stop_rules=(),
    )
    ids = prompt.expand(n, -1)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 4, "max_new_tokens": 1}
    generate(decoder, ids, **options)
    counts = torch.zeros(128, dtype=torch.float64)
    rejected = 0
    for trace in decoder.traces:
        step = trace.steps[0]
        if "rejected" in step:
            rejected += 1
            counts[step["tokens"][0]] += 1
    with torch.no_grad():
        logits = base(prompt).logits[0, -1].double()
    kept = logits.topk(4)
    p = torch.zeros_like(logits).scatter(0, kept.indices, kept.values.softmax(0))
    assert rejected > 60
    expected = p * rejected
    seen = expected > 0
    assert counts[~seen].sum() == 0
    chi = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    assert chi < 16.3  # 3 degrees of freedom, one in a thousand


def test_streams_and_cancels():
    small = models()[1]
    ids, mask = tiny.prompts(1, 0)

    streamer = Streamer()
    decoder = bw.StepSpeculative(small, judge([9.0, 0.0] * 50), step_ends)
    out = generate(decoder, ids, mask, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended
    monitor = bw.Monitor(progress=False)

    def cancelling(context, step):
        if len(context) > ids.shape[1] + 8:
            monitor.cancel()
        return 9.0

    decoder = bw.StepSpeculative(small, cancelling, step_ends, monitor=monitor)
    short = generate(decoder, ids, mask)
    assert ids.shape[1] + 8 < short.shape[1] < ids.shape[1] + NEW
    assert decoder.traces[0].tokens == short[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "message, call",
    [
        ("step_tokens must be at least 1, got 0", lambda s: bw.StepSpeculative(s, judge([]), step_ends, step_tokens=0)),
        ("first_base_steps", lambda s: bw.StepSpeculative(s, judge([]), step_ends, first_base_steps=-1)),
        ("budget must be at least 0", lambda s: bw.StepSpeculative(s, judge([]), step_ends, budget=-1)),
        ("digits must be single tokens", lambda s: bw.JudgeScore(type("T", (), {"encode": lambda *a, **k: [1, 2]})())),
        ("suffix must have at least one token", lambda s: bw.JudgeScore(Digits(), "")),
        ("markers must be strings", lambda s: bw.AnswerFound(None, [""])),
    ],
)
def test_refusals(message, call):
    with pytest.raises(ValueError, match=message):
        call(models()[1])
