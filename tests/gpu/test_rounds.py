"""Whole rounds in graphs: trees in, verdict out, and nothing that Python decided once is decided again."""

import copy
from contextlib import contextmanager

import pytest
import torch
from recorded import RecordedGraphs

import branchwise as bw
import tiny
from branchwise import graphs
from branchwise.decoding import rounds
from branchwise.decoding.rounds import padded_rows, padded_size
from branchwise.drafters import EarlyExit
from branchwise.static_store import StaticStore
from random_drafter import RandomTrees


@pytest.fixture
def recorder(device, monkeypatch):
    """Of the device; in the emulator, the stand-in."""
    made = RecordedGraphs() if device.emulated else graphs.CudaGraphs()
    monkeypatch.setattr("branchwise.decoding.tree_speculation.recorder_for", lambda where: made)
    return made


@pytest.fixture
def speculation(device, recorder):
    return lambda *args, **options: Speculation(device, *args, **options)


class Speculation:
    """Tree speculation with random trees that often contain what plain decoding says."""

    def __init__(self, device, name="llama", sampled=False):
        self.device, self.sampled = device, sampled
        self.host = tiny.model(name)  # decodes plainly; graphs want weights that stay where they are
        self.model = self.host if device.emulated else copy.deepcopy(self.host).cuda()
        self.spec = bw.TreeSpeculation("none", max_nodes=12, adaptive=False, seed=4)

    def check(self, rows=3, seed=7, new=24, drafter=None, eos_after=None, **options):
        """Texts equal those of plain decoding. ``eos_after``: the row's token there ends texts."""
        ids, mask = tiny.prompts(rows, seed)
        options = {"max_new_tokens": new, "do_sample": self.sampled, "top_k": 0, **options}
        sampler = bw.PositionKeyedSampler(seed=4) if self.sampled else None

        def plainly():
            return self.host.generate(ids, custom_generate=sampler, attention_mask=mask, **options)

        if eos_after is not None:
            row, place = eos_after
            options["eos_token_id"] = int(plainly()[row, ids.shape[1] + place])
        plain = plainly()
        texts = [row[ids.shape[1] :].tolist() for row in plain]
        self.spec.drafter = RandomTrees(texts, 1) if drafter is None else drafter
        with self.device.active():
            inputs = {"inputs": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
            ours = self.model.generate(**inputs, custom_generate=self.spec, **options)
        assert torch.equal(plain, ours.cpu())
        assert self.spec.stats.accepted > 0
        return self.rounds

    @property
    def rounds(self):
        return self.spec._rounds[self.model]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gpt_neox", "qwen3"])
def test_texts_are_those_of_plain_decoding(name, sampled, speculation):
    done = speculation(name, sampled).check()
    assert done.unfit is None
    assert done.recorded > 1


def test_a_cache_in_e4m3(device, recorder):
    """In graphs, with rows that leave: what the CPU says."""
    model = tiny.model("llama")
    ids, mask = tiny.prompts(3, 7)
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": mask, "eos_token_id": []}
    plain = model.generate(ids, custom_generate=bw.TreeSpeculation("none", kv_dtype=torch.float8_e4m3fn), **options)
    texts = [row[ids.shape[1] :].tolist() for row in plain]
    drafter = RandomTrees(texts, 1)
    spec = bw.TreeSpeculation(drafter, max_nodes=12, adaptive=False, kv_dtype=torch.float8_e4m3fn)
    there = model if device.emulated else copy.deepcopy(model).cuda()
    with device.active():
        for _ in range(2):
            moved = {**options, "attention_mask": mask.to(there.device), "eos_token_id": texts[1][9]}
            ours = there.generate(ids.to(there.device), custom_generate=spec, **moved).cpu()
            ends = [text.index(texts[1][9]) + 1 if texts[1][9] in text else 24 for text in texts]
            for row, text, end in zip(ours, texts, ends, strict=True):
                assert row[ids.shape[1] :][:end].tolist() == text[:end]
    rounds = spec._rounds[there]
    assert rounds.recorded > 0 and rounds.store.layers[0].keys.dtype == torch.float8_e4m3fn


def test_mixtures_of_experts(speculation):
    """Recorded or not, as transformers' version has it."""
    done = speculation("qwen3_moe").check()
    assert (done.recorded == 0) == (done.unfit is not None)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 20, "repetition_penalty": 1.3}], ids=str)
def test_processors(options, speculation):
    """Temperature is the rule's business; with other processors, a graph holds the forward alone."""
    done = speculation("llama", True).check(**options)
    decided = {key.rule is not None for key in done._rounds}
    assert decided == {"temperature" in options}
    assert done.recorded > 1


@pytest.mark.parametrize("rule", ["each_child", "one_coin"])
def test_noise_of_nodes(rule, device, recorder):
    """Rules whose noise belongs to nodes: the same draws with and without graphs."""
    model, (ids, mask) = tiny.model("llama"), tiny.prompts(3, 7)
    texts = []
    for graphed in (False, True):
        drafter = RandomTrees(torch.randint(3, 20, (3, 30), generator=torch.Generator().manual_seed(1)).tolist(), 1)
        spec = bw.TreeSpeculation(drafter, 12, adaptive=False, rule=rule, seed=4, graphs=graphed)
        with device.active():
            on = model if device.emulated else model.cuda()
            inputs = {"inputs": ids.to(on.device), "attention_mask": mask.to(on.device)}
            texts.append(on.generate(**inputs, custom_generate=spec, do_sample=True, top_k=0, max_new_tokens=16))
        assert bool(len(spec._rounds)) == graphed
    assert torch.equal(*texts)
    model.cpu()


def test_calls_share_graphs(speculation):
    spec = speculation()
    first = spec.check()
    made, keys = first.recorded, set(first._rounds)
    assert spec.check(seed=8) is first
    assert first.recorded <= made + len(set(first._rounds) - keys) + 1  # of shapes that were new, or seen once
    assert spec.check(rows=2, seed=9, new=8) is first
    assert spec.check(rows=4, seed=9, new=8) is not first


def test_rows_that_end_leave_in_steps(speculation):
    done = speculation().check(rows=5, new=30, eos_after=(1, 3))
    assert {key.rows for key in done._rounds} <= {5, 4, 2, 1}
    assert len({key.rows for key in done._rounds}) > 1
    done.store.begin(5)
    assert len(done.store.caches()[0]) == 5


def test_slots_that_move_end_graphs(speculation, monkeypatch):
    monkeypatch.setattr(rounds, "StaticStore", lambda rows, slots, scales: StaticStore(rows, 1, scales))
    spec = speculation()
    done = spec.check(rows=2, new=60)
    assert done.store.capacity > 64
    spec.check(rows=1, new=40, seed=3)


def test_weights_that_move_end_graphs(speculation):
    spec = speculation("olmo2")
    first = spec.check()
    heads = [model.lm_head.weight for model in {spec.host, spec.model}]
    saved = heads[0].detach().cpu().clone()
    try:
        with torch.no_grad():
            for head in heads:
                head.copy_(saved.roll(1, 0))  # as training does
        assert spec.check() is first
        for head in heads:
            head.data = saved.roll(2, 0).to(head.device)
        assert spec.check() is not first
    finally:
        spec.host.lm_head.weight.data = saved


def test_a_model_that_reads_values_runs_without_graphs(speculation):
    spec = speculation("mistral")
    norms = spec.model.model.norm.register_forward_hook(lambda module, inputs, out: out * float(out.sum() == out.sum()))
    try:
        done = spec.check()
    finally:
        norms.remove()
    assert done.recorded == 0
    assert done.unfit == "MistralForCausalLM calls aten::_local_scalar_dense in its forward"


def test_a_recording_that_fails(speculation, recorder, monkeypatch):
    def fail(run):
        raise RuntimeError("out of graphs")

    monkeypatch.setattr(recorder, "record", fail)
    done = speculation().check()
    assert done.recorded == 0 and done.unfit == "out of graphs"


def test_drafters_get_logits(speculation):
    done = speculation().check(new=40, drafter=bw.drafters.TokenRecycling())
    assert done.recorded > 0
    assert all(key.keep_logits for key in done._rounds)


def test_drafters_that_change_layers_end_graphs(speculation):
    done = speculation().check(drafter=EarlyExit(2, width=2))
    assert done.recorded == 0 and not done._rounds


def test_logits_that_are_no_distribution(device, recorder):
    model = tiny.model("llama")
    ids, calls = torch.ones(1, 4, dtype=torch.int64), []

    def spoil(module, inputs, out):
        calls.append(module)
        return out if len(calls) == 1 else torch.full_like(out, torch.nan)  # not the prompt's

    hook = model.lm_head.register_forward_hook(spoil)
    try:
        on = model if device.emulated else model.cuda()
        with device.active(), pytest.raises(RuntimeError, match="neither NaN nor"):
            spec = bw.TreeSpeculation("none")
            on.generate(ids.to(on.device), custom_generate=spec, max_new_tokens=9, do_sample=True, top_k=0)
    finally:
        hook.remove()
        model.cpu()


def test_one_node_per_row_goes_on_by_itself(speculation):
    """Lengths and roots of the next round are on the device already."""
    spec = speculation()
    spec.spec.max_nodes = 1
    ids, mask = tiny.prompts(3, 7)
    plain = spec.host.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=None)[:, ids.shape[1] :]
    with spec.device.active():
        inputs = {"inputs": ids.to(spec.model.device), "attention_mask": mask.to(spec.model.device)}
        spec.model.generate(**inputs, custom_generate=spec.spec, max_new_tokens=6, eos_token_id=None)
    done = spec.rounds
    [(key, round_)] = done._rounds.items()
    exchange = done._exchanges[key.rows, key.nodes]
    for step in range(6, 12):
        with torch.no_grad():
            round_.recording.replay()
        assert exchange.trees_there[0][:, 0].tolist() == plain[:, step].tolist()


class TestTheStandIn:
    """It must notice what a graph would do wrong."""

    @pytest.fixture(autouse=True)
    def emulated_only(self, device):
        if not device.emulated:
            pytest.skip("of the emulator")

    def test_lengths_that_are_the_hosts(self, speculation, monkeypatch):
        @contextmanager
        def ignore(store, seq_lens):
            yield

        monkeypatch.setattr(StaticStore, "lengths_on_device", ignore)
        with pytest.raises(AssertionError):
            speculation().check()

    def test_noise_that_is_the_hosts(self, speculation, monkeypatch):
        real = rounds.Noise.of
        monkeypatch.setattr(rounds.Noise, "of", lambda keys, numbers: real(keys.clone().fill_(3), numbers))
        with pytest.raises(AssertionError):
            speculation("llama", True).check()

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x: x * float(x.max()),
            lambda x: x[x > 1],
            lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
            lambda x: x.nonzero(),
        ],
    )
    def test_values_on_the_host(self, wrong):
        with pytest.raises(RuntimeError, match="not permitted"):
            RecordedGraphs().record(lambda: wrong(torch.arange(3.0)))

    def test_recording_has_no_effect_and_replays_have(self):
        x, total = torch.arange(3.0), torch.zeros(3)

        def run():
            y = torch.zeros(3)
            y[1:] += x[1:]  # of its own
            total.add_(y)
            return y * 2

        recording, out = RecordedGraphs().record(run)
        assert total.tolist() == [0, 0, 0]
        x.add_(1)
        recording.replay()
        recording.replay()
        assert total.tolist() == [0, 4, 6]
        assert out.tolist() == [0, 4, 6]


def test_padded_sizes():
    assert [padded_size(n, 64) for n in (1, 2, 3, 9, 17, 33, 64)] == [1, 2, 4, 16, 24, 48, 64]
    assert padded_size(9, 12) == 12
    assert padded_size(65, 1024) == 128
    assert [padded_rows(n) for n in (1, 2, 3, 4, 5, 33)] == [1, 2, 4, 4, 8, 64]
