"""transformers' candidate generators as drafters."""

import copy

import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from transformers.generation import candidate_generator as hf

import branchwise as bw
import tiny
from branchwise.drafters import Candidates, DraftRequest, PromptLookup
from test_sampling import run
from test_tree_speculation import letter_tokenizer


def lookup(ids):
    return hf.PromptLookupCandidateGenerator(num_output_tokens=5, max_matching_ngram_size=2, max_length=1000)


def assistant(name="qwen3"):
    model = copy.deepcopy(tiny.model(name))  # its attention is not switched with the target's

    def make(ids):
        config = copy.deepcopy(model.generation_config)
        config.update(max_length=1000, min_length=0, do_sample=False)
        return hf.AssistedCandidateGenerator(ids, model, config, {"attention_mask": torch.ones_like(ids)})

    return make


def test_proposes_what_the_generator_does():
    """Prompt lookup with transformers' rule is our own with match="first"."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompt = rng.integers(3, 7, rng.integers(3, 30)).astype(np.int32)
        ours = PromptLookup(2, 5, match="first").begin(DraftRequest([prompt])).propose([4])[0]
        theirs = Candidates(lookup).begin(DraftRequest([prompt])).propose([4])[0]
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.parents.tolist() == theirs.parents.tolist()


@pytest.mark.parametrize("make", [lookup, assistant()], ids=["lookup", "assistant"])
@pytest.mark.parametrize("sampling", [False, True])
def test_lossless_in_a_ragged_batch(make, sampling):
    model = tiny.model("llama")
    ids, mask = tiny.prompts(3, 2)
    plain = run(model, ids, mask, bw.PositionKeyedSampler(1) if sampling else None, do_sample=sampling, top_k=None)
    spec = bw.TreeSpeculation(Candidates(make), seed=1, adaptive=False)
    assert torch.equal(plain, run(model, ids, mask, spec, do_sample=sampling, top_k=None))
    assert spec.stats.drafted > 0


def test_the_model_itself_as_assistant_is_accepted():
    """Its cache must follow the text from round to round."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(2, 2)
    plain = run(model, ids, mask, None, do_sample=False, top_k=None)
    spec = bw.TreeSpeculation(Candidates(assistant("llama")), adaptive=False)
    assert torch.equal(plain, run(model, ids, mask, spec, do_sample=False, top_k=None))
    assert spec.stats.accepted == spec.stats.drafted > 0


def test_refuses_a_generator_that_changes_the_text():
    class Rude(hf.CandidateGenerator):
        def get_candidates(self, input_ids, **kwargs):
            return input_ids + 1, None

    ids, mask = tiny.prompts(1, 2)
    with pytest.raises(ValueError, match=r"Rude.get_candidates must return its input and tokens behind it"):
        run(tiny.model("llama"), ids, mask, bw.TreeSpeculation(Candidates(lambda ids: Rude())))


def test_another_tokenizer_is_translated():
    """The target itself with its vocabulary reversed: what it drafts in its own ids is right in the target's."""
    target = tiny.model("llama")
    draft = copy.deepcopy(target)
    with torch.no_grad():
        for weights in (draft.get_input_embeddings().weight, draft.get_output_embeddings().weight):
            weights.copy_(weights.flip(0).clone())
    draft.generation_config.eos_token_id = draft.generation_config.bos_token_id = None
    reversed_letters = {letter: 127 - i for letter, i in letter_tokenizer().get_vocab().items()}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(reversed_letters, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    theirs = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = torch.tensor([[20, 30, 40, 50, 60], [25, 35, 45, 55, 65]])
    mask = torch.ones_like(ids)
    plain = run(target, ids, mask, None, do_sample=False, top_k=None)
    drafter = Candidates.translated(draft, theirs, letter_tokenizer())
    spec = bw.TreeSpeculation(drafter, adaptive=False)
    assert torch.equal(plain, run(target, ids, mask, spec, do_sample=False, top_k=None))
    assert spec.stats.accepted > 0
