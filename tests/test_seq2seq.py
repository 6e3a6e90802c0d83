"""BigLittle on encoder-decoders: the loop of card bild with plain forwards, and its limits."""

import math
from functools import cache

import pytest
import torch
import transformers as tf

import branchwise as bw
import tiny
from test_diffusion import Streamer

NEW = 24
_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_HEAD = {"tie_word_embeddings": False}
CONFIGS = {
    "t5": lambda: tf.T5Config(**_T5, **_IDS, **_HEAD),
    "bart": lambda: tf.BartConfig(**_BART, **_IDS, **_HEAD, bos_token_id=0, forced_eos_token_id=None),
}


@cache
def models(name):
    """A model, and one like it but for noise in the decoder's layers."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    big, little = (tf.AutoModelForSeq2SeqLM.from_config(config).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in big.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.35)
        big.lm_head.weight *= 3  # sure enough of what they say
        little.load_state_dict(big.state_dict())
        for parameter in little.get_decoder().parameters():
            if parameter.dim() >= 2 and len(parameter) != 128:
                parameter += 0.1 * torch.randn_like(parameter)
    for model in (big, little):
        model.generation_config = tf.GenerationConfig(**_IDS)
    return big, little


def batch():
    ids = torch.randint(3, 120, (3, 15), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(15) < torch.tensor([[15], [9], [4]])).long()
    return torch.where(mask.bool(), ids, 0), mask


def generate(model, ids, mask, **options):
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False, **options})


@torch.no_grad()
def by_the_card(big, little, ids, mask, fallback, rollback, tokens, first_only, eos=1):
    text = [0]

    def log_probs(model, text):
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor([text]))
        return out.logits[0].double().log_softmax(-1)

    while len(text) < NEW + 1 and (len(text) == 1 or text[-1] != eos):
        written = []
        while len(written) < tokens and len(text) + len(written) < NEW:
            row = log_probs(little, text + written)[-1]
            if float(row.max().exp()) < fallback or int(row.argmax()) == eos:
                break
            written.append(int(row.argmax()))
        rows = log_probs(big, text + written)[len(text) - 1 :]
        kept = len(written)
        for i, token in enumerate(written):
            if -float(rows[i, token]) > rollback:
                if int(rows[i].argmax()) != token:
                    kept = i
                    break
                if first_only:
                    break
        text += [*written[:kept], int(rows[kept].argmax())]
    return text


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("fallback, rollback, tokens", [(0.5, 2.0, 10), (0.2, 0.7, 4), (0.0, 5.0, 3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_is_the_loop_of_the_card(name, fallback, rollback, tokens, first_only):
    (big, little), (ids, mask) = models(name), batch()
    decoder = bw.BigLittle(little, fallback, rollback, tokens, first_only)
    out = generate(big, ids, mask, custom_generate=decoder)
    for row in range(3):
        here = slice(row, row + 1)
        text = by_the_card(big, little, ids[here], mask[here], fallback, rollback, tokens, first_only)
        assert out[row, : len(text)].tolist() == text and not out[row, len(text) :].any()
    stats = decoder.stats
    assert stats.drafted > stats.accepted > 0 and not stats.exact
    assert (
        sum(map(len, stats.accepted_flags)) == stats.emitted and sum(map(sum, stats.accepted_flags)) == stats.accepted
    )


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 10}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_limits(name, options):
    """Never sure, or never forgiven: plain greedy decoding, with its processors. Always forgiven: as many forwards of
    the big model as there are rounds."""
    (big, little), (ids, mask) = models(name), batch()
    greedy = generate(big, ids, mask, **options)
    for decoder in (bw.BigLittle(little, fallback=1.01), bw.BigLittle(little, fallback=0.0, rollback=0.0)):
        assert torch.equal(generate(big, ids, mask, custom_generate=decoder, **options), greedy)
    assert decoder.stats.accepted > 0 and decoder.stats.forwards < decoder.stats.emitted
    lax = bw.BigLittle(little, fallback=0.0, rollback=math.inf, little_tokens=5)
    out = generate(big, ids, mask, custom_generate=lax, eos_token_id=None, **options)
    assert lax.stats.acceptance == 1 and lax.stats.forwards == 3 * (NEW // 6)
    assert not torch.equal(out, generate(big, ids, mask, eos_token_id=None, **options))


def test_only_the_big_model_ends_a_text():
    (big, little), (ids, mask) = models("t5"), batch()
    free = by_the_card(big, little, ids[:1], mask[:1], 0.0, math.inf, 3, False, eos=-1)
    differs = 0
    for eos in set(free[1:]):
        out = generate(
            big, ids[:1], mask[:1], custom_generate=bw.BigLittle(little, 0.0, math.inf, 3), eos_token_id=eos
        )[0].tolist()
        assert out == by_the_card(big, little, ids[:1], mask[:1], 0.0, math.inf, 3, False, eos=eos)
        differs += out != free[: free.index(eos, 1) + 1]
    assert differs > 0


def test_streams():
    (big, little), (ids, mask) = models("t5"), batch()

    streamer = Streamer()
    out = generate(big, ids[:1], mask[:1], custom_generate=bw.BigLittle(little), streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_refusals():
    (big, little), (ids, mask) = models("t5"), batch()
    with pytest.raises(ValueError, match="little must be an encoder-decoder if, and only if"):
        generate(big, ids, mask, custom_generate=bw.BigLittle(tiny.model("llama")))
    with pytest.raises(ValueError, match="little must be an encoder-decoder if, and only if"):
        generate(tiny.model("llama"), ids, None, custom_generate=bw.BigLittle(little))
    with pytest.raises(ValueError, match="do_sample must be False"):
        generate(big, ids, mask, custom_generate=bw.BigLittle(little), do_sample=True)
    with pytest.raises(ValueError, match=r"through generate\(custom_generate=...\) only"):
        bw.BigLittle(little)(big, ids[:, :1])
    with pytest.raises(ValueError, match="return_dict_in_generate=True is not supported"):
        generate(big, ids, mask, custom_generate=bw.BigLittle(little), return_dict_in_generate=True)
