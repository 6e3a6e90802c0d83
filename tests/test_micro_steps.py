"""MicroSteps with a toy of HAMburger's architecture, against a loop that reads everything afresh for every group."""

import math

import pytest
import torch
from torch import nn

import branchwise as bw
import tiny
from branchwise.attention import use_attention
from branchwise.cache import CACHE_NAME, KVStore
from branchwise.forward import StoredModel
from test_diffusion import Streamer

NEW = 24
M = 32


class ToyHead(nn.Module):
    """Card hamburger in small: a merger with one query, and a micro decoder with a cache of its own."""

    max_steps = 4
    feature_layers = (0, 2)

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.place = nn.Parameter(torch.randn(4, M // 2))
        self.q, self.o = nn.Linear(M, M, bias=False), nn.Linear(M, M, bias=False)
        self.k, self.v = (nn.Linear(M + M // 2, M, bias=False) for _ in range(2))
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(M, M, bias=False) for name in ("q", "k", "v", "o")}) for _ in range(2)
        )
        self.stop = nn.Linear(M, 1)
        for weight in self.parameters():
            weight.data *= 2

    def merge(self, embeddings, sizes):
        B, S, _ = embeddings.shape
        inside = torch.arange(S) < sizes[:, None]
        mean = (embeddings * inside[..., None]).sum(1) / sizes[:, None]
        places = torch.cat([embeddings, self.place[:S].expand(B, -1, -1)], -1)
        scores = torch.einsum("bm,bsm->bs", self.q(mean), self.k(places)) / math.sqrt(M)
        weights = scores.masked_fill(~inside, -math.inf).softmax(-1)
        merged = mean + self.o(torch.einsum("bs,bsm->bm", weights, self.v(places)))
        return torch.where((sizes == 1)[:, None], embeddings[:, 0], merged)

    def micro(self, x, caches):
        """Causal layers over what is new, [B, n, M]."""
        grown = []
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            keys, values = torch.cat([keys, layer["k"](x)], 1), torch.cat([values, layer["v"](x)], 1)
            scores = layer["q"](x) @ keys.mT / math.sqrt(M)
            seen = torch.arange(keys.shape[1]) <= keys.shape[1] - x.shape[1] + torch.arange(x.shape[1])[:, None]
            x = x + layer["o"](scores.masked_fill(~seen, -math.inf).softmax(-1) @ values)
            grown.append((keys, values))
        return x, grown

    def step(self, features, last, state):
        if last is None:
            hidden, state = features[:, -1], None
        else:
            empty = features.new_empty(len(features), 0, M)
            new = last[:, None] if state is not None else torch.cat([features, last[:, None]], 1)
            out, state = self.micro(new, state or [(empty, empty)] * 2)
            hidden = out[:, -1]
        return hidden, self.stop(hidden)[:, 0].sigmoid(), state


@torch.no_grad()
def slow(model, head, prompt, threshold, most=4, eos=2, off_by=0, new=NEW):
    """Text, and the number of groups."""
    embed = model.get_input_embeddings()
    text, groups = list(prompt), []
    while True:
        x, positions = embed(torch.tensor([prompt])), list(range(len(prompt)))
        for group in groups:
            merged = head.merge(embed(torch.tensor([group])), torch.tensor([len(group)]))
            x = torch.cat([x, merged[:, None]], 1)
            positions.append(positions[-1] + len(group) + off_by)
        out = model(inputs_embeds=x, position_ids=torch.tensor([positions]), output_hidden_states=True)
        # hidden_states[0] are embeddings; the last ones are normed already
        features = torch.stack([out.hidden_states[index + 1][:, -1] for index in head.feature_layers], 1)
        group = []
        while True:
            if group:
                everything = torch.cat([features, embed(torch.tensor([group]))], 1)
                empty = [(torch.empty(1, 0, M),) * 2] * 2
                hidden = head.micro(everything, empty)[0][:, -1]
            else:
                hidden = features[:, -1]
            group.append(int(model.lm_head(hidden).argmax()))
            text.append(group[-1])
            if text[-1] == eos or len(text) == len(prompt) + new:
                return text, len(groups)
            if len(group) == most or 1 - float(head.stop(hidden).sigmoid()) < threshold:
                break
        groups.append(group)


def batch():
    ids, mask = tiny.prompts(4, 2)
    return ids, mask, [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]


def generate(model, decoder, ids, mask, **options):
    return model.generate(
        ids, attention_mask=mask, custom_generate=decoder, **{"max_new_tokens": NEW, "do_sample": False, **options}
    )


@pytest.mark.parametrize("most", [2, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "olmo2"])
def test_is_the_loop_of_the_card(name, threshold, most):
    model, head = tiny.model(name), ToyHead()
    if name == "gpt_neox":
        model.lm_head = model.get_output_embeddings()
    ids, mask, prompts = batch()
    decoder = bw.MicroSteps(head, threshold, most)
    out = generate(model, decoder, ids, mask)
    groups = 0
    for row, prompt in enumerate(prompts):
        text, count = slow(model, head, prompt, threshold, most)
        start = ids.shape[1] - len(prompt)
        assert out[row, start : start + len(text)].tolist() == text and not out[row, start + len(text) :].any()
        assert decoder.slots[row] == len(prompt) + count  # one slot per group, the last group has none yet
        groups += count + 1
    stats = decoder.stats
    assert stats.emitted > 1.2 * groups or threshold > 0
    assert stats.row_forwards == groups  # the prompt's forward counts as one for each row


def test_positions_are_those_of_the_last_token():
    """The loop with positions one further on, as the published generation loop has them, gives another text."""
    model, head = tiny.model("llama"), ToyHead()
    ids, mask, prompts = batch()
    out = generate(model, bw.MicroSteps(head, 0.0), ids, mask, eos_token_id=None, max_new_tokens=60)
    right, wrong = (
        [slow(model, head, prompt, 0.0, eos=None, off_by=off_by, new=60)[0] for prompt in prompts] for off_by in (0, 1)
    )
    assert [row[-len(text) :].tolist() for row, text in zip(out, right, strict=True)] == right
    assert right != wrong


class Scripted(ToyHead):
    """Groups of given sizes."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.at = iter(sizes), 0

    def step(self, features, last, state):
        hidden, _, state = super().step(features, last, state)
        if last is None:
            self.size, self.at = next(self.sizes), 0
        self.at += 1
        return hidden, torch.tensor([float(self.at == self.size)]), state


def test_slots_and_positions():
    """Groups of 3, 1 and 4 tokens behind a prompt of 10: positions 12, 13 and 17, slots 10, 11 and 12."""
    model = tiny.model("llama")
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["position_ids"].flatten().tolist(), kwargs[CACHE_NAME].seq_lens.tolist())
        ),
        with_kwargs=True,
    )
    decoder = bw.MicroSteps(Scripted([3, 1, 4, 2]), 0.5)
    generate(model, decoder, torch.arange(20, 30)[None], None, max_new_tokens=10, eos_token_id=None)
    handle.remove()
    assert seen == [(list(range(10)), [0]), ([12], [10]), ([13], [11]), ([17], [12])]
    assert decoder.slots == [13] and decoder.stats.emitted == 10


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 20}], ids=str)
def test_groups_of_one_are_plain_decoding(options):
    model = tiny.model("llama")
    ids, mask, _ = batch()
    plain = bw.PositionKeyedSampler(seed=4) if options.get("do_sample") else None
    expected = generate(model, plain, ids, mask, **options)
    for decoder in (bw.MicroSteps(ToyHead(), max_steps=1, seed=4), bw.MicroSteps(ToyHead(), threshold=1.1, seed=4)):
        assert torch.equal(generate(model, decoder, ids, mask, **options), expected)
        assert decoder.stats.row_forwards == decoder.stats.emitted


def test_sampled_groups_repeat_and_do_not_depend_on_the_batch():
    model, head = tiny.model("llama"), ToyHead()
    ids, mask, prompts = batch()
    decoder = bw.MicroSteps(head, 0.3, seed=1)
    out = generate(model, decoder, ids, mask, do_sample=True, top_k=20)
    for row, prompt in enumerate(prompts):
        alone = generate(model, decoder, torch.tensor([prompt]), None, do_sample=True, top_k=20)[0]
        assert out[row, ids.shape[1] - len(prompt) :][: len(alone)].tolist() == alone.tolist()[: out.shape[1]]


def test_an_end_inside_a_group_ends_the_text():
    model, head = tiny.model("llama"), ToyHead()
    ids, mask, prompts = batch()
    free = generate(model, bw.MicroSteps(head, 0.0), ids, mask, eos_token_id=None)
    row = prompts[0]
    said = free[0, ids.shape[1] :].tolist()
    for i in (1, 2, 6):  # groups are of four
        out = generate(model, bw.MicroSteps(head, 0.0), torch.tensor([row]), None, eos_token_id=said[i])[0].tolist()
        assert out[len(row) :] == said[: said.index(said[i]) + 1]


def test_the_store_takes_back_whole_groups():
    """Slots are groups: forgetting two of them and reading them again gives the same hidden states, at any capacity."""
    model, head = tiny.model("llama"), ToyHead()
    groups = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
    prompt = torch.arange(20, 40)

    def read(stored, groups, position):
        states = []
        for group in groups:
            position += len(group)
            merged = head.merge(model.get_input_embeddings()(torch.tensor([group])), torch.tensor([len(group)]))
            logits = stored.forward(torch.tensor([group[:1]]), torch.tensor([[position]]), embeddings=merged[:, None])
            stored.store.advance(torch.ones(1, dtype=torch.int32))
            states.append(logits)
        return torch.cat(states)

    with torch.no_grad(), use_attention(model):
        stored = StoredModel(model, KVStore(1, 8))
        stored.extend([prompt])
        whole = read(stored, groups, 19)
        assert stored.store.seq_lens.tolist() == [24]  # 30 tokens
        stored.store.set_lengths(torch.tensor([22], dtype=torch.int32))
        again = read(stored, groups[2:], 23)
    assert torch.equal(again, whole[2:])


def test_streams_and_cancels():
    model, head = tiny.model("llama"), ToyHead()
    prompts = batch()[2]
    prompt = torch.tensor([prompts[0]])

    streamer = Streamer()
    out = generate(model, bw.MicroSteps(head, 0.0), prompt, None, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended
    monitor = bw.Monitor(progress=False)
    advance = monitor.advance
    monitor.advance = lambda tokens: (advance(tokens), monitor.cancel())
    short = generate(model, bw.MicroSteps(head, 0.0, monitor=monitor), prompt, None, eos_token_id=None)
    assert short.shape[1] == prompt.shape[1] + 4


def test_refusals():
    ids, mask, _ = batch()
    with pytest.raises(ValueError, match="max_steps must lie between 1 and the head's 4, got 5"):
        bw.MicroSteps(ToyHead(), max_steps=5)
    with pytest.raises(ValueError, match=r"layers \[0, 2\] have a sliding window"):
        generate(tiny.model("gemma3"), bw.MicroSteps(ToyHead()), ids, mask)
    with pytest.raises(ValueError, match="return_dict_in_generate=True is not supported by MicroSteps"):
        generate(tiny.model("llama"), bw.MicroSteps(ToyHead()), ids, mask, return_dict_in_generate=True)
