"""Decoders of masked-diffusion models against a brute-force loop, FreeDave against static decoding, caches, batches."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from branchwise.diffusion import (
    BlockDecoder,
    DiffusionSpec,
    EntropyBudget,
    FreeDave,
    MaskedDiffusionConfig,
    MaskedDiffusionLM,
    Static,
    Threshold,
    TimeSchedule,
)
from branchwise.diffusion.model import block_pattern
from branchwise.ops.diffusion import confidence_reference, step_reference

MASK, V = 1, 50
RULES = {
    "one": Static(),
    "steps2": Static(2),
    "margin": Static(score="margin"),
    "threshold": Threshold(0.05),
    "budget": EntropyBudget(4.0),
    "dream": TimeSchedule(3),
}
CACHES = {"block_causal": ("block", "none"), "full": ("none", "prefix", "dual")}
PAIRS = [(attention, cache) for attention, caches in CACHES.items() for cache in caches]


@cache
def model(attention="block_causal", block=4, seed=0, **options):
    torch.manual_seed(seed)
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **options}
    config = MaskedDiffusionConfig(
        mask_token_id=MASK,
        attention=attention,
        block_size=block,
        vocab_size=V,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        **options,
    )
    made = MaskedDiffusionLM(config).eval()
    made.lm_head.weight.data *= 6  # sharper than random weights are
    return made


def prompts(rows=3, longest=11):
    """Left-padded, lengths 11, 10, .. and one of a single token."""
    ids = torch.randint(3, V, (rows, longest), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(longest) >= torch.arange(rows)[:, None]).long()
    if rows > 1:
        mask[-1] = 0
        mask[-1, -1] = 1
    return ids * mask, mask


def decode(m, decoder, ids, mask, new=19, **options):
    return m.generate(ids, attention_mask=mask, max_new_tokens=new, custom_generate=decoder, **options)


def length_of(attention):
    return None if attention == "block_causal" else 8


# An independent loop: whole texts through the model's own forward with dense masks, one row, Python sorting.


def brute_force(m, prompt, new, rule, attention, block, cache):
    """The text, and how many steps it took."""
    P, steps = len(prompt), 0
    blocks = attention == "block_causal"
    size = -(-(P + new) // block) * block if blocks else P + new
    origin = 0 if blocks else P
    text = prompt.tolist() + [MASK] * (size - P)
    for begin in range(origin + (P - origin) // block * block, size, block):
        end = min(begin + block, size)
        at_begin = list(text)
        counts = rule.counts(text[begin:end].count(MASK))
        for count in counts:
            if MASK not in text[begin:end]:
                break
            logits = predict(m, text, at_begin, begin, end, attention, block, cache)
            tokens, scores = confidence_reference(logits, torch.tensor([MASK]), score=rule.score)
            here = [-float("inf")] * begin + scores[begin:end].tolist() + [-float("inf")] * (size - end)
            text = step_reference(text, tokens.tolist(), here, origin, count, MASK, block, rule.rule, rule.level)
            steps += 1
    return text[: P + new], steps


@torch.no_grad()
def predict(m, text, at_begin, begin, end, attention, block, cache):
    """Logits [n, V] under a cache policy; stale keys are those of a second copy of the text, as it was at the block's
    beginning, in the same forward."""
    n = len(text)
    if attention == "block_causal" or cache == "none":
        sees = block_pattern(n, block if attention == "block_causal" else n)
        return m(torch.tensor([text]), attention_mask=sees[None, None]).logits[0].float()
    fresh = list(range(begin, end if cache == "dual" else n))
    sees = torch.zeros(n + len(fresh), n + len(fresh), dtype=torch.bool)
    sees[:n, :n] = True
    stale = [i for i in range(n) if i not in fresh]
    sees[n:, n:] = True
    sees[n:, stale] = True
    ids = torch.tensor([at_begin + [text[i] for i in fresh]])
    positions = torch.tensor([list(range(n)) + fresh])
    out = m(ids, attention_mask=sees[None, None], position_ids=positions).logits[0].float()
    logits = out[:n].clone()
    logits[fresh] = out[n:]
    return logits


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention, cache", PAIRS)
def test_static_decoding_is_the_brute_force_loop(attention, cache, rule):
    m = model(attention)
    ids, mask = prompts()
    decoder = BlockDecoder(RULES[rule], length_of(attention), cache)
    out = decode(m, decoder, ids, mask)
    for row in range(3):
        prompt = ids[row, mask[row].bool()]
        wanted, _ = brute_force(m, prompt, 19, RULES[rule], attention, length_of(attention) or 4, cache)
        assert out[row, mask.shape[1] - len(prompt) :].tolist() == wanted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention, cache", PAIRS)
def test_freedave_gives_the_static_text(attention, cache, rule):
    """Every draft length, eager or not, in a batch; never more forwards, and as many with one draft."""
    for block, seed in ((4, 0), (5, 1)):
        m = model(attention, block, seed)
        ids, mask = prompts()
        length = length_of(attention)
        static = BlockDecoder(RULES[rule], length, cache)
        wanted = decode(m, static, ids, mask)
        for draft_length in (1, 2, 4, 8, 16):
            for eager in (False, True):
                options = {"block_length": length, "cache": cache, "least_chance": 0.0 if eager else None}
                dave = FreeDave(RULES[rule], draft_length, eager, **options)
                assert torch.equal(decode(m, dave, ids, mask), wanted)
                assert dave.stats.forwards <= static.stats.forwards
                if draft_length == 1 and not eager:
                    assert dave.stats.forwards == static.stats.forwards
        if static.stats.forwards > 8:  # a block of two or three forwards has nothing to draft
            assert dave.stats.forwards < static.stats.forwards and dave.stats.accepted > 0


@pytest.mark.parametrize("attention, cache", PAIRS)
def test_rows_are_what_they_are_alone(attention, cache):
    m, length = model(attention), length_of(attention)
    ids, mask = prompts(rows=4)
    for decoder in (BlockDecoder(None, length, cache), FreeDave(None, 8, block_length=length, cache=cache)):
        together = decode(m, decoder, ids, mask)
        for row in range(4):
            own = mask[row].bool()
            alone = decode(m, decoder, ids[row : row + 1, own], mask[row : row + 1, own])
            assert torch.equal(alone[0, -19:], together[row, -19:])
            assert torch.equal(together[row, : mask.shape[1]], ids[row]), "prompts stay as they are"


@pytest.mark.parametrize("attention, cache", PAIRS)
def test_forms_agree(attention, cache):
    m, length = model(attention), length_of(attention)
    ids, mask = prompts()
    outs, forwards = [], []
    for form in ("pages", "tree", "copy"):
        dave = FreeDave(None, 6, block_length=length, cache=cache, form=form, least_chance=0.05)
        outs.append(decode(m, dave, ids, mask))
        forwards.append(dave.stats.forwards)
    assert all(torch.equal(out, outs[0]) for out in outs) and len(set(forwards)) == 1


def trajectory(m, prompt, new, block):
    """States of static decoding without a cache, and the predictions at each: lists of tokens and scores."""
    text = prompt.tolist() + [MASK] * new
    states, predictions = [text], []
    while MASK in text:
        logits = predict(m, text, text, 0, len(text), "full", block, "none")
        tokens, scores = confidence_reference(logits, torch.tensor([MASK]))
        predictions.append((tokens.tolist(), scores.tolist()))
        text = step_reference(text, *predictions[-1], len(prompt), 1, MASK, block, "count", 0.0)
        states.append(text)
    return states, predictions


@pytest.mark.parametrize("draft_length", [1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forwards_are_the_fewest_possible(seed, draft_length):
    """Over all ways to jump along the static states that the drafts of each state can prove, by exhaustion.

    A forward at state i proves any later one up to the first where the drafts leave the static path. The last step
    needs no forward.
    """
    m = model("full", 4, seed)
    prompt, new = prompts(1)[0][0], 17
    states, predictions = trajectory(m, prompt, new, 8)
    n = len(states) - 1

    def reach(i):
        state, far = states[i], i
        while far < min(n, i + draft_length):
            state = step_reference(state, *predictions[i], len(prompt), 1, MASK, 8, "count", 0.0)
            if state != states[far + 1]:
                break
            far += 1
        return far

    fewest = [0] * (n + 1)
    for i in range(n - 2, -1, -1):
        fewest[i] = 1 + min(fewest[j] for j in range(i + 1, min(reach(i), n - 1) + 1))
    dave = FreeDave(None, draft_length, drafts="chain", block_length=8, least_chance=0.0)
    out = decode(m, dave, prompt[None], torch.ones(1, len(prompt), dtype=torch.long), new=new)
    assert out[0].tolist() == states[-1]
    assert dave.stats.forwards == 1 + fewest[0]
    if draft_length >= 8:
        assert dave.stats.forwards < n / 1.5


def test_states_are_those_of_static_decoding():
    m = model("full")
    prompt = prompts(1)[0]
    states = {tuple(state) for state in trajectory(m, prompt[0], 19, 8)[0]}
    seen = []
    dave = FreeDave(None, 5, block_length=8, on_state=lambda row, tokens: seen.append(tuple(tokens.tolist())))
    decode(m, dave, prompt, None)
    assert len(seen) > 3 and set(seen) <= states


def test_wrong_drafts_cost_forwards_only(monkeypatch):
    """Drafts behind the first are spoilt: one step per forward, and the text of static decoding."""
    from branchwise import ops

    m = model()
    ids, mask = prompts()
    static = BlockDecoder()
    wanted = decode(m, static, ids, mask)
    draft = ops.draft_blocks

    def spoilt(window, *rest):
        drafts, num = draft(window, *rest)
        new = (drafts[:, 1:] != window[:, None]) & (window[:, None] == MASK)
        drafts[:, 1:] = torch.where(new, 3 + (drafts[:, 1:] + 1) % (V - 3), drafts[:, 1:])
        return drafts, num

    monkeypatch.setattr(ops, "draft_blocks", spoilt)
    dave = FreeDave(None, 8, eager=False, drafts="chain")
    assert torch.equal(decode(m, dave, ids, mask), wanted)
    assert dave.stats.accepted == 0 and dave.stats.drafted > 0


def test_wrong_guesses_cost_forwards_only(monkeypatch):
    """States of a tree whose tokens are all wrong."""
    from branchwise.diffusion.guesses import Guesser

    m = model()
    ids, mask = prompts()
    static = BlockDecoder()
    wanted = decode(m, static, ids, mask)
    grow = Guesser.grow

    def spoilt(self, *arguments):
        guesses = grow(self, *arguments)
        for guess in guesses:
            guess.added = {position: 3 + (token + 1) % (V - 3) for position, token in guess.added.items()}
        return guesses

    monkeypatch.setattr(Guesser, "grow", spoilt)
    dave = FreeDave(None, 6, least_chance=0.0)
    assert torch.equal(decode(m, dave, ids, mask), wanted)
    assert dave.stats.drafted > 0 and dave.stats.accepted < dave.stats.drafted / 10


def test_trees_learn_what_turns_out():
    """Tables fill, their shares follow what was seen, and a tree needs fewer forwards than a chain of its size."""
    m = model("full", 4, 1)
    ids, mask = prompts()
    forwards = {}
    for drafts in ("chain", "tree"):
        dave = FreeDave(None, 8, drafts=drafts, block_length=8, least_chance=0.0)
        forwards[drafts] = 0
        for _ in range(4):
            decode(m, dave, ids, mask)
            forwards[drafts] += dave.stats.row_forwards
    assert forwards["tree"] <= forwards["chain"]
    assert sum(map(sum, dave.table.ranks.values())) > 20 * len(dave.table.ranks) + 50
    table = dave.table
    before = list(table.of_ranks(1, 0.5))
    table.observe(1, 0.5, 2, 0.5, 7)
    after = table.of_ranks(1, 0.5)
    assert after[2] == before[2] + 1 and table.of_tokens(1, 0.5)[3] >= 1


@pytest.mark.parametrize("attention, cache", PAIRS)
def test_sampling_with_fixed_noise(attention, cache):
    """One seed, one text: static, FreeDave, batches; another seed, another text."""
    m, length = model(attention), length_of(attention)
    ids, mask = prompts()
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0}
    texts = {}
    for seed in (1, 2):
        static = decode(m, BlockDecoder(None, length, cache, seed=seed), ids, mask, **options)
        for draft_length in (2, 8):
            dave = FreeDave(None, draft_length, block_length=length, cache=cache, seed=seed)
            assert torch.equal(decode(m, dave, ids, mask, **options), static)
        own = mask[1].bool()
        alone = BlockDecoder(None, length, cache, seed=seed)
        assert torch.equal(decode(m, alone, ids[1:2, own], None, **options)[0, -19:], static[1, -19:])
        texts[seed] = static
    assert not torch.equal(texts[1], texts[2])
    assert not torch.equal(texts[1], decode(m, BlockDecoder(None, length, cache), ids, mask))


def test_processors_that_look_at_scores_alone_are_applied():
    m = model()
    ids, mask = prompts()
    greedy = decode(m, BlockDecoder(), ids, mask)
    options = {"do_sample": True, "temperature": 1.3}
    assert torch.equal(decode(m, BlockDecoder(seed=3), ids, mask, top_k=1, **options), greedy)
    with pytest.raises(ValueError, match="RepetitionPenaltyLogitsProcessor: it reads the text"):
        decode(m, BlockDecoder(), ids, mask, repetition_penalty=1.2)


@pytest.mark.parametrize("decoder", [BlockDecoder, FreeDave])
def test_ends_of_texts(decoder):
    """A row ends at the first end token that is known together with all before it; the rest of the batch goes on."""
    m = model()
    ids, mask = prompts()
    whole = decode(m, decoder(), ids, mask)
    end = int(whole[0, mask.shape[1] + 6])
    out = decode(m, decoder(), ids, mask, eos_token_id=end)
    for row in range(3):
        new = whole[row, mask.shape[1] :].tolist()
        kept = new[: new.index(end) + 1] if end in new else new
        assert out[row, mask.shape[1] :].tolist() == kept + [0] * (out.shape[1] - mask.shape[1] - len(kept))


class Streamer:
    """What ``generate`` takes: keeps the tokens."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streaming():
    m, streamer = model(), Streamer()
    prompt = prompts(1)[0]
    out = decode(m, FreeDave(), prompt, None, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_the_models_own_generate_and_forward():
    m = model()
    ids, mask = prompts()
    assert torch.equal(m.generate(ids, attention_mask=mask, max_new_tokens=19), decode(m, FreeDave(), ids, mask))
    for attention, block in (("block_causal", 4), ("full", 11)):
        m = model(attention)
        padded = m(ids, attention_mask=mask).logits
        for row in range(3):
            own = mask[row].bool()
            alone = m(ids[row : row + 1, own]).logits[0]
            torch.testing.assert_close(padded[row, own], alone, atol=1e-5, rtol=1e-5)
            n = int(own.sum())
            sees = block_pattern(n, block)[None, None]
            torch.testing.assert_close(
                m(ids[row : row + 1, own], attention_mask=sees).logits[0], alone, atol=1e-6, rtol=1e-6
            )


def test_a_token_sees_its_block_and_those_before_it():
    m = model()
    ids = prompts(1)[0]
    before = m(ids).logits[0]
    other = ids.clone()
    other[0, 6] = 3 + (other[0, 6] - 2) % 40
    changed = (m(other).logits[0] - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 7
    assert ((model("full")(other).logits[0] - model("full")(ids).logits[0]).abs().amax(1) > 1e-6).all()


def test_refuses():
    m, (ids, mask) = model(), prompts()
    for message, make in {
        "draft_length must lie between 1 and 64, got 0": lambda: FreeDave(draft_length=0),
        "drafts must be 'tree' or 'chain', got 'bush'": lambda: FreeDave(drafts="bush"),
        r"least_chance must lie in \[0, 1\], got 2": lambda: FreeDave(least_chance=2),
        "cache must be one of block, none, prefix, dual, got 'big'": lambda: BlockDecoder(cache="big"),
        "form must be one of pages, tree, copy, got 'x'": lambda: BlockDecoder(form="x"),
        "block_length must be at least 1, got 0": lambda: BlockDecoder(block_length=0),
        "steps must be at least 1, got 0": lambda: Static(0),
        "end must lie between 0 and 1, got 2": lambda: TimeSchedule(3, end=2),
        "budget must be at least 0, got -1": lambda: EntropyBudget(-1),
        "shift must be 0 for a block-causal": lambda: DiffusionSpec(1, "block_causal", 4, shift=1),
        "attention must be 'full' or": lambda: DiffusionSpec(1, "causal"),
        "attention must be 'block_causal' or": lambda: MaskedDiffusionConfig(attention="causal"),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    for message, decoder in {
        "cache = 'dual' does not fit a model with attention 'block_causal'": BlockDecoder(cache="dual"),
        "block_length must be the model's block size 4, got 8": BlockDecoder(block_length=8),
    }.items():
        with pytest.raises(ValueError, match=message):
            decode(m, decoder, ids, mask)
    with pytest.raises(ValueError, match="return_dict_in_generate=True is not supported"):
        decode(m, FreeDave(), ids, mask, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="input_ids of row 1 hold the mask, 1"):
        decode(m, FreeDave(), torch.where(torch.tensor([[False], [True], [False]]), MASK, ids), mask)
    with pytest.raises(ValueError, match="asks for beam"):
        decode(m, FreeDave(), ids, mask, num_beams=2)
    broken = model(seed=7)
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"logits at position \d+ of row \d are NaN"):
        decode(broken, FreeDave(), ids, mask)
