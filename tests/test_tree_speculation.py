"""TreeSpeculation under model.generate: lossless for any tree, any model, any batch; and everything around it."""

import string

import pytest
import tokenizers
import torch
import transformers as tf
from tokenizers import decoders, models, pre_tokenizers

import branchwise as bw
import tiny
from branchwise.cache import CACHE_NAME
from random_drafter import RandomTrees

N = 24  # new tokens


def decoder(truth=None, seed=0, **options):
    options = {"max_nodes": 20, "adaptive": False, **options}
    drafter = RandomTrees(truth, seed) if truth is not None else "trie"
    return bw.TreeSpeculation(drafter, **options)


def run(model, ids, mask, custom=None, **options):
    options = {"max_new_tokens": N, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, custom_generate=custom, **options)


def both(model, ids, mask, seed=0, spec_options=None, **options):
    """Plain output, and ours with random trees that often contain it."""
    plain = run(model, ids, mask, **options)
    truth = [row[ids.shape[1] :].tolist() for row in plain]
    spec = decoder(truth, seed, **(spec_options or {}))
    ours = run(model, ids, mask, spec, **options)
    return plain, ours, spec


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_equals_plain_generate(name, batch, seed):
    """With test_adversarial_cases, over 200 random cases: 13 architectures, ragged batches, random trees."""
    ids, mask = tiny.prompts(batch, seed)
    plain, ours, spec = both(tiny.model(name), ids, mask, seed)
    assert torch.equal(plain, ours)
    # A row may end at once, but a run that goes on must have exercised acceptance.
    assert spec.stats.accepted > 0 or spec.stats.emitted < 4 * batch


@pytest.mark.parametrize("seed", range(100))
def test_adversarial_cases(seed):
    names = list(tiny.CONFIGS)
    ids, mask = tiny.prompts(1 + seed % 5, 100 + seed, longest=30)
    options = {"max_nodes": (2, 5, 33, 70)[seed % 4], "adaptive": seed % 3 == 0}
    plain, ours, _ = both(tiny.model(names[seed % len(names)]), ids, mask, seed, options, max_new_tokens=12 + seed % 9)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("drafter", ["trie", "suffix", "prompt_lookup"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_named_drafters_cold_and_warm(name, drafter):
    model = tiny.model(name)
    ids, mask = tiny.prompts(4, 7)
    plain = run(model, ids, mask, max_new_tokens=40)
    spec = bw.TreeSpeculation(drafter)
    for _ in range(2):
        assert torch.equal(run(model, ids, mask, spec, max_new_tokens=40), plain)


def test_a_repeated_request_is_mostly_drafted():
    model = tiny.model("gemma2")
    ids, mask = tiny.prompts(1, 3)
    spec = decoder(max_nodes=32)
    for _ in range(2):
        run(model, ids, mask, spec, max_new_tokens=60, eos_token_id=[])
    rounds = spec.stats.forwards - 1  # the prompt's forward has no draft
    assert spec.stats.accepted / rounds >= 0.8 * 12  # of branch_length


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10},
        {"bad_words_ids": [[5], [7, 8], [11]]},
        {"sequence_bias": [[[4], -5.0], [[3, 9], 8.0]]},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (5, 1.5)},
        {"suppress_tokens": [3, 4, 5, 6]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("batch", [1, 3])
def test_processors_apply_to_each_nodes_own_path(options, batch):
    ids, mask = tiny.prompts(batch, 11)
    plain, ours, spec = both(tiny.model("qwen3"), ids, mask, **options)
    assert torch.equal(plain, ours) and spec.stats.accepted > 0


def test_prefix_allowed_tokens_fn_gets_the_row():
    def allowed(row, ids):
        return [3 + row, 10 + (int(ids[-1]) + row) % 7, 40 + len(ids) % 5]

    ids, mask = tiny.prompts(3, 12)
    plain, ours, _ = both(tiny.model("llama"), ids, mask, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(plain, ours)


def test_custom_processors_work():
    class OddOnly(tf.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == input_ids[:, -1:] % 2, -1e9)

    ids, mask = tiny.prompts(2, 13)
    processors = tf.LogitsProcessorList([OddOnly()])
    plain, ours, _ = both(tiny.model("phi3"), ids, mask, logits_processor=processors)
    assert torch.equal(plain, ours)


def test_eos_inside_an_accepted_run_ends_the_row():
    model = tiny.model("gemma2")
    ids, mask = tiny.prompts(4, 21)
    plain = run(model, ids, mask, eos_token_id=[])
    eos = [int(plain[0, ids.shape[1] + 5]), int(plain[2, ids.shape[1] + 9])]
    for seed in range(5):
        plain, ours, _ = both(model, ids, mask, seed, eos_token_id=eos)
        assert torch.equal(plain, ours) and (ours == 0).any()


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_max_new_tokens_is_exact(n):
    ids, mask = tiny.prompts(3, 22)
    plain, ours, spec = both(tiny.model("llama"), ids, mask, max_new_tokens=n)
    assert torch.equal(plain, ours)
    assert spec.stats.emitted <= 3 * n


LETTERS = [*string.ascii_letters, *map(chr, range(0x4E00, 0x4E00 + 128 - 52))]


def letter_tokenizer():
    """Token i is the letter i."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings():
    model, tokenizer = tiny.model("gemma2"), letter_tokenizer()
    ids, mask = tiny.prompts(3, 23)
    plain = run(model, ids, mask)
    stop = "".join(LETTERS[t] for t in plain[1, ids.shape[1] + 6 : ids.shape[1] + 8])
    criteria = tf.StoppingCriteriaList([tf.StopStringCriteria(tokenizer, [stop])])
    plain = run(model, ids, mask, stopping_criteria=criteria)
    spec = decoder([row[ids.shape[1] :].tolist() for row in plain])
    assert torch.equal(run(model, ids, mask, spec, stopping_criteria=criteria), plain)
    named = bw.generate(
        model, ids, attention_mask=mask, decoder=spec, tokenizer=tokenizer, stop_strings=stop, max_new_tokens=N
    )
    assert torch.equal(named, plain)
    with pytest.raises(ValueError, match="stop_strings needs the model's tokenizer"):
        bw.generate(model, ids, stop_strings="x")


class Recorder:
    def __init__(self):
        self.chunks, self.ended = [], 0

    def put(self, tokens):
        self.chunks.append(tokens.flatten().tolist())

    def end(self):
        self.ended += 1


def test_streamer_gets_prompt_tokens_and_end():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 24)
    expected, actual = Recorder(), Recorder()
    plain = run(model, ids, mask, streamer=expected)
    run(model, ids, mask, decoder([plain[0, ids.shape[1] :].tolist()]), streamer=actual)
    assert actual.chunks == expected.chunks and actual.ended == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_return_dict(batch):
    model = tiny.model("olmo2")
    ids, mask = tiny.prompts(batch, 25)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain = run(model, ids, mask, **options)
    spec = decoder([row[ids.shape[1] :].tolist() for row in plain.sequences])
    ours = run(model, ids, mask, spec, **options)
    assert torch.equal(plain.sequences, ours.sequences)
    assert len(ours.scores) == len(ours.logits) == len(plain.scores)
    for t in range(len(plain.scores)):
        for row in range(batch):
            if (plain.sequences[row, ids.shape[1] : ids.shape[1] + t] == 2).any():
                continue  # ended
            torch.testing.assert_close(ours.scores[t][row], plain.scores[t][row], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.logits[t][row], plain.logits[t][row], atol=1e-4, rtol=1e-4)
    stats = ours.stats
    assert stats is spec.stats and stats.forwards >= 2 and stats.emitted >= stats.accepted
    assert sum(map(sum, stats.accepted_flags)) == stats.accepted
    assert stats.tokens_per_forward >= 1 and 0 < stats.acceptance <= 1
    assert min(stats.seconds_prefill, stats.seconds_draft, stats.seconds_forward, stats.seconds_verify) > 0


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_kv_store_equals_a_fresh_prefill(name):
    model = tiny.model(name)
    ids, mask = tiny.prompts(3, 26)
    options = {"return_dict_in_generate": True, "eos_token_id": []}
    plain = run(model, ids, mask, **options).sequences
    spec = decoder([row[ids.shape[1] :].tolist() for row in plain])
    store = run(model, ids, mask, spec, **options)[CACHE_NAME]
    for row in range(3):
        text = plain[row, ids.shape[1] - int(mask[row].sum()) : -1][None]  # the last token has no KV yet
        fresh = model(text, **{CACHE_NAME: tf.DynamicCache()})[CACHE_NAME]
        for layer in range(len(fresh.layers)):
            key, value = store.row(layer, row)
            torch.testing.assert_close(key, fresh.layers[layer].keys[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(value, fresh.layers[layer].values[0], atol=1e-5, rtol=1e-5)


def test_long_prompts_are_prefilled_in_chunks(monkeypatch):
    from branchwise import forward

    monkeypatch.setattr(forward, "_CHUNK", 7)
    for name in ("llama", "gemma3"):
        ids, mask = tiny.prompts(4, 27)
        plain, ours, _ = both(tiny.model(name), ids, mask)
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("drafter", ["auto", "trie", "token_recycling", "lookahead"])
def test_inside_inference_mode(drafter):
    """Stores that are kept between calls serve calls in either mode."""
    model, (ids, mask) = tiny.model("llama"), tiny.prompts(2, 30)
    expected, kept = run(model, ids, mask), bw.TreeSpeculation(drafter)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert torch.equal(run(model, ids, mask, kept), expected)


def test_num_return_sequences():
    ids, mask = tiny.prompts(2, 28)
    out = run(tiny.model("llama"), ids, mask, decoder(), do_sample=True, num_return_sequences=3)
    assert out.shape[0] == 6 and torch.equal(out[0, : ids.shape[1]], out[2, : ids.shape[1]])


def test_the_model_is_restored_also_after_errors():
    model = tiny.model("llama")
    before = model.config._attn_implementation
    ids, mask = tiny.prompts(1, 29)

    class Broken(RandomTrees):
        def propose(self, budgets):
            assert model.config._attn_implementation == "branchwise"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(model, ids, mask, bw.TreeSpeculation(Broken([[]])))
    assert model.config._attn_implementation == before
    run(model, ids, mask)
