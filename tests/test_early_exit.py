"""EarlyExitLossy: the law of exits, late layers that see every token, and rows that do not mind each other."""

from itertools import pairwise

import pytest
import torch

import branchwise as bw
import tiny
from branchwise.cache import CACHE_NAME
from branchwise.decoding import early_exit
from branchwise.layers import decoder_layers
from test_sampling import run

N = 30
GREEDY = {"do_sample": False, "top_k": None, "max_new_tokens": N}


@pytest.mark.parametrize("name", [n for n in tiny.CONFIGS if n != "gemma4"])
def test_without_exits_it_is_the_model(name):
    model = tiny.model(name)
    ids, mask = tiny.prompts(4, 7)
    decoder = bw.EarlyExitLossy({1: 2.0, 2: 2.0})
    assert torch.equal(run(model, ids, mask, None, **GREEDY), run(model, ids, mask, decoder, **GREEDY))
    assert decoder.exits[1] == decoder.exits[2] == 0 and decoder.exits[3] > 0
    assert not decoder.stats.exact and all("forward" not in layer.__dict__ for layer in decoder_layers(model))


@torch.no_grad()
def shallow_text(model, layers, ids, new_tokens):
    """Greedy text of the first layers alone, but over the full model's prompt: every forward from scratch."""
    ids = ids.clone()
    for i in range(new_tokens):
        hidden = model(ids, output_hidden_states=True).hidden_states
        state = hidden[-1] if i == 0 else model.model.norm(hidden[layers])
        ids = torch.cat([ids, model.lm_head(state[:, -1]).argmax(-1, keepdim=True)], 1)
    return ids


def test_always_exiting_is_the_first_layers_text():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 3)
    for layers in (1, 2):
        decoder = bw.EarlyExitLossy({layers: 0.0})
        out = run(model, ids, mask, decoder, eos_token_id=[], **GREEDY)
        assert torch.equal(out, shallow_text(model, layers, ids, N))
        assert decoder.exits[layers] == N - 1


@torch.no_grad()
def exits_by_hand(model, thresholds, ids, new_tokens):
    """Confidence exits, every forward from scratch, so that all layers have seen all tokens."""
    ids = ids.clone()
    depths = []
    for i in range(new_tokens):
        out = model(ids, output_hidden_states=True)
        logits, depth = out.logits[:, -1], 3
        for layers, threshold in thresholds.items():
            early = model.lm_head(model.model.norm(out.hidden_states[layers]))[:, -1]
            if i > 0 and float(early.softmax(-1).max()) >= threshold:
                logits, depth = early, layers
                break
        depths.append(depth)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids, depths


def confident(seed=0):
    """A model whose exits differ in confidence."""
    import copy

    model = copy.deepcopy(tiny.model("llama"))
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)
    return model


def test_tokens_are_taken_where_a_layer_is_sure_in_any_batch():
    model = confident()
    thresholds = {1: 0.5, 2: 0.4}
    ids, mask = tiny.prompts(4, 9)
    decoder = bw.EarlyExitLossy(thresholds)
    both = run(model, ids, mask, decoder, eos_token_id=[], **GREEDY)
    counts = dict.fromkeys((1, 2, 3), 0)
    for row in range(4):
        start = int((mask[row] == 0).sum())
        expected, depths = exits_by_hand(model, thresholds, ids[row : row + 1, start:], N)
        assert torch.equal(both[row, start:], expected[0])
        for depth in depths[1:]:
            counts[depth] += 1
    assert decoder.exits == counts and all(counts.values())


def test_late_layers_hold_the_full_models_keys(monkeypatch):
    """Every layer's slots, as far as it has come, are those of a fresh forward over the text."""
    model = confident()
    ids, mask = tiny.prompts(2, 3)
    staged = []
    close = early_exit._StagedModel.close
    monkeypatch.setattr(early_exit._StagedModel, "close", lambda self: staged.append(self) or close(self))
    out = run(model, ids, mask, bw.EarlyExitLossy({1: 0.5, 2: 0.4}), eos_token_id=[], **GREEDY)
    store = staged[0].model.store
    for row in range(2):
        start = int((mask[row] == 0).sum())
        full = model(out[row : row + 1, start:], use_cache=True)[CACHE_NAME]
        done = [int(stage[row]) for stage in staged[0]._done]
        assert done[0] == out.shape[1] - start - 1 > done[1] >= done[2]  # the last token has not been seen
        for layer in range(3):
            ours, theirs = store.layers[layer].keys[row, :, : done[layer]], full.layers[layer].keys[0, :, : done[layer]]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_controller_stops_and_exits():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(2, 3)
    exits = bw.EarlyExitLossy({1: 0.0}, controller=lambda hidden: torch.tensor([[0.0, 9.0, 0.0]]))
    plain_exit = run(model, ids, mask, bw.EarlyExitLossy({1: 0.0}), **GREEDY)
    assert torch.equal(run(model, ids, mask, exits, **GREEDY), plain_exit)
    goes_on = bw.EarlyExitLossy({1: 0.0}, controller=lambda hidden: torch.tensor([[0.0, 0.0, 9.0]]))
    assert torch.equal(run(model, ids, mask, goes_on, **GREEDY), run(model, ids, mask, None, **GREEDY))
    stops = bw.EarlyExitLossy({1: 0.0}, controller=lambda hidden: torch.tensor([[9.0, 0.0, 0.0]]))
    out = run(model, ids, mask, stops, **GREEDY)
    assert out.shape[1] == ids.shape[1] + 1 and sorted(stops.stopped) == [0, 1]
    unsure = bw.EarlyExitLossy({1: 0.0}, controller=lambda h: torch.tensor([[0.2, 0.0, 0.0]]), stop_threshold=0.9)
    assert torch.equal(run(model, ids, mask, unsure, **GREEDY), run(model, ids, mask, None, **GREEDY))


def test_processors_and_eos():
    model = confident()
    ids, mask = tiny.prompts(3, 5)
    decoder = bw.EarlyExitLossy({1: 0.3})
    out = run(model, ids, mask, decoder, repetition_penalty=1.3, no_repeat_ngram_size=2, **GREEDY)
    for row in out[:, ids.shape[1] :].tolist():
        row = row[: row.index(2)] if 2 in row else row
        pairs = list(pairwise(row))
        assert len(set(pairs)) == len(pairs)
    result = run(model, ids, mask, decoder, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences, run(model, ids, mask, decoder, **GREEDY))


def test_refusals():
    model = tiny.model("llama")
    ids, mask = tiny.prompts(1, 3)
    with pytest.raises(ValueError, match=r"at least one positive number of layers, got \{\}"):
        bw.EarlyExitLossy({})
    for decoder, target, options, message in (
        (bw.EarlyExitLossy({3: 0.5}), model, GREEDY, "exits must lie before the model's last layer, 3, got 3"),
        (bw.EarlyExitLossy({1: 0.5}), model, {"do_sample": True}, "decodes greedily"),
        (bw.EarlyExitLossy({1: 0.5}), tiny.model("gemma4"), GREEDY, "layers that read the keys of earlier ones"),
    ):
        with pytest.raises(ValueError, match=message):
            run(target, ids, mask, decoder, **options)
