"""BigLittle against the loop of its card, token by token with plain forwards, and its limits."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import transformers as tf

import branchwise as bw
import tiny
from branchwise.drafters import Confident

NEW = 40


@cache
def little(seed=0):
    """Half of its tokens are the big one's: the same embeddings and head, other layers."""
    torch.manual_seed(seed)
    big = tiny.model("llama")
    config = tiny.CONFIGS["llama"]()
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(big.state_dict())
    for layer in model.model.layers:
        for weight in layer.parameters():
            weight.data += 0.3 * weight.data.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    return model


@cache
def sharp():
    """The tiny model, surer of what it says."""
    big = tiny.model("llama")
    model = tf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).eval()
    model.load_state_dict(big.state_dict())
    model.lm_head.weight.data *= 24
    small = little()
    other = tf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).eval()
    other.load_state_dict(small.state_dict())
    other.lm_head.weight.data *= 24
    return model, other


def batch():
    ids = torch.randint(3, 120, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(20) >= torch.tensor([[0], [7], [13]])).long()
    return torch.where(mask.bool(), ids, 0), mask


def decode(model, decoder, ids, mask, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, custom_generate=decoder, **options)


@torch.no_grad()
def by_the_card(big, small, prompt, fallback, rollback, tokens, first_only=False, eos=None, new=NEW):
    """The text, and how many tokens were rolled back."""
    text, taken_back = prompt.tolist(), 0

    def log_probs(model, upto=None):
        return model(torch.tensor([text[:upto]])).logits[0].double().log_softmax(-1)

    def ended():
        return len(text) >= len(prompt) + new or (eos is not None and len(text) > len(prompt) and text[-1] == eos)

    text.append(int(log_probs(big)[-1].argmax()))
    while not ended():
        written = []
        while len(written) < tokens and len(text) < len(prompt) + new - 1:
            p = log_probs(small)[-1]
            token = int(p.argmax())
            if float(p[token].exp()) < fallback or token == eos:
                break
            written.append(token)
            text.append(token)
        rows = log_probs(big)
        begin = len(text) - len(written)
        for i, token in enumerate(written):
            row = rows[begin + i - 1]
            if -float(row[token]) > rollback:
                if int(row.argmax()) != token:
                    taken_back += len(written) - i
                    del text[begin + i :]
                    rows = rows[: begin + i]
                    break
                if first_only:
                    break
        text.append(int(rows[-1].argmax()))
    return text[: len(prompt) + new], taken_back


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("fallback, rollback, tokens", [(0.5, 2.0, 10), (0.2, 0.7, 4), (0.0, 5.0, 3), (0.9, 1.0, 10)])
def test_is_the_loop_of_the_card(fallback, rollback, tokens, first_only):
    (big, small), (ids, mask) = sharp(), batch()
    decoder = bw.BigLittle(small, fallback, rollback, tokens, first_only)
    out = decode(big, decoder, ids, mask)
    drafted = accepted = 0
    for row in range(3):
        prompt = ids[row, mask[row].bool()]
        wanted, _ = by_the_card(big, small, prompt, fallback, rollback, tokens, first_only)
        assert out[row, 20 - len(prompt) :].tolist() == wanted
        alone = decode(big, decoder, prompt[None], torch.ones(1, len(prompt), dtype=torch.long))
        assert alone[0].tolist() == wanted
        drafted, accepted = drafted + decoder.stats.drafted, accepted + decoder.stats.accepted
    assert not decoder.stats.exact and drafted > accepted > 0


def test_limits():
    """Never sure, or never forgiven: the big model's greedy text. Always sure and always forgiven: the small one's, but
    for every fourth token."""
    (big, small), (ids, mask) = sharp(), batch()
    greedy = big.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    never_sure = bw.BigLittle(small, fallback=1.01)
    assert torch.equal(decode(big, never_sure, ids, mask), greedy) and never_sure.stats.drafted == 0
    strict = bw.BigLittle(small, fallback=0.0, rollback=0.0)
    assert torch.equal(decode(big, strict, ids, mask), greedy) and strict.stats.accepted > 0
    lax = bw.BigLittle(small, fallback=0.0, rollback=math.inf, little_tokens=3)
    out = decode(big, lax, ids, mask)
    assert lax.stats.accepted == lax.stats.drafted
    with torch.no_grad():
        for row in range(3):
            text = out[row, mask[row].bool().int().argmax() :]
            P = int(mask[row].sum())
            for i in range(P, len(text) - 1):  # the last token is the big one's
                model = big if (i - P) % 4 == 0 else small
                assert int(model(text[None, :i]).logits[0, -1].argmax()) == int(text[i])
    assert not torch.equal(out, greedy)


def test_larger_rollbacks_take_back_less():
    (big, small), (ids, mask) = sharp(), batch()
    shares = []
    for rollback in (0.0, 1.0, 3.0, math.inf):
        decoder = bw.BigLittle(small, 0.3, rollback)
        decode(big, decoder, ids, mask)
        shares.append(decoder.stats.acceptance)
    assert shares == sorted(shares) and shares[0] < shares[-1] == 1.0


def test_no_accepted_token_is_a_surprise():
    (big, small), (ids, mask) = sharp(), batch()
    decoder = bw.BigLittle(small, 0.2, 1.5)
    out = decode(big, decoder, ids, mask)
    surprises = 0
    with torch.no_grad():
        for row in range(3):
            text = out[row, mask[row].bool().int().argmax() :]
            P = int(mask[row].sum())
            log_probs = big(text[None]).logits[0].log_softmax(-1)
            for i in range(P, len(text)):
                nats = -float(log_probs[i - 1, text[i]])
                assert nats <= 1.5 + 1e-4 or int(log_probs[i - 1].argmax()) == int(text[i])
                surprises += int(log_probs[i - 1].argmax()) != int(text[i])
    assert surprises > 0, "all tokens were the big model's: a weak test"


def test_only_the_big_model_ends_a_text():
    """Every token that the small model may say is tried as the end: the text is that of the loop."""
    (big, small), (ids, _) = sharp(), batch()
    prompt = ids[0]
    free, _ = by_the_card(big, small, prompt, 0.0, math.inf, 3)
    ends = {free[len(prompt) + i] for i in range(1, 30)}
    differs = 0
    for eos in ends:
        wanted, _ = by_the_card(big, small, prompt, 0.0, math.inf, 3, eos=eos)
        out = decode(big, bw.BigLittle(small, 0.0, math.inf, 3), prompt[None], None, eos_token_id=eos)[0].tolist()
        assert out == wanted
        with torch.no_grad():
            if out[-1] == eos:
                assert int(big(torch.tensor([out[:-1]])).logits[0, -1].argmax()) == eos
        cut = free[: free.index(eos, len(prompt)) + 1]
        differs += out != cut
    assert differs > 0, "no end was ever left to the big model: a weak test"


def test_refuses():
    (big, small), (ids, mask) = sharp(), batch()
    for message, make in {
        "rollback must be at least 0 nats, got -1": lambda: bw.BigLittle(small, rollback=-1),
        "little_tokens must lie between 1 and 1023, got 0": lambda: bw.BigLittle(small, little_tokens=0),
        "confidence must be at least 0, got -0.5": lambda: Confident(small, -0.5),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="decodes greedily: do_sample must be False"):
        decode(big, bw.BigLittle(small), ids, mask, do_sample=True)
