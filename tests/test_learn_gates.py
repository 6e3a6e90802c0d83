"""examples/learn_gates.py and learn_gates_rl.py on toy models."""

import importlib
import sys
from pathlib import Path

import torch
import transformers as tf

import branchwise as bw
import tiny
from branchwise import kv

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name="learn_gates"):
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def toy():
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).eval()


def batches(n):
    def batch(step):
        ids = torch.randint(3, 120, (1, n), generator=torch.Generator().manual_seed(step))
        counts = torch.zeros(n, dtype=torch.bool)
        counts[n // 2 :] = True
        return ids, counts

    return batch


def test_open_gates_are_the_model_itself():
    module, model = example(), toy()
    ids = batches(50)(0)[0]
    plain = model(ids).logits
    gates = module.Gates(model, 4, 8)
    with module.gated(model, gates):
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation != "gates"


def test_closed_gates_are_streaming_heads():
    """The logits of HeadwiseKV with every head streaming, token by token."""
    module, model = example(), tiny.model("llama")
    ids = batches(60)(0)[0]
    with bw.sparse_kv(model, kv.HeadwiseKV(torch.zeros(3, 2), 1.0, 4, 61, page_size=4)):
        text = model.generate(ids, max_new_tokens=1, do_sample=False)
    gates = module.Gates(model, 4, 61)
    gates.values.data.zero_()
    with module.gated(model, gates), torch.no_grad():
        assert int(model(ids).logits[0, -1].argmax()) == int(text[0, -1])
    gates.recent = 8
    seen = []
    with module.gated(model, gates), torch.no_grad():
        for changed in (0, 20, 55):  # a sink, nothing, the window (three layers reach 3 * 7 tokens back)
            other = ids.clone()
            other[0, changed] = 3 + (other[0, changed] - 2) % 100
            seen.append(not torch.allclose(model(other).logits[0, -1], model(ids).logits[0, -1], atol=1e-6))
    assert seen[0] and seen[2]


def test_gates_close_where_the_window_holds_everything_and_stay_open_where_not():
    module = example()
    distances = []
    short = module.learn_gates(toy(), batches(20), 60, 4, 32, report=lambda s, d, g: distances.append(d))
    assert max(distances) < 1e-9 and (short < 0.2).all()
    long = module.learn_gates(tiny.model("llama"), batches(80), 40, 2, 8, penalty=0.001)
    assert long.shape == (3, 2) and (long >= 0).all() and (long <= 1).all() and long.mean() > short.mean()
    for parameter in tiny.model("llama").parameters():
        parameter.requires_grad_(True)


def decided():
    """A toy model that is sure of every token."""
    model = toy()
    model.lm_head.weight.data *= 300
    return model


def greedy_questions(module, model, n=24, new=6):
    """Right is what the model says with all gates open."""
    questions = []
    for step in range(60):
        ids = batches(n)(step)[0]
        wanted = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)[0, n:]
        questions.append(module.Question(ids, lambda answer, wanted=wanted: torch.equal(answer, wanted)))
    return questions.__getitem__


def test_rewards_close_gates_that_do_nothing_and_spare_those_that_do():
    module = example("learn_gates_rl")
    means, rewards = {}, {}
    for recent in (64, 2):  # everything, and next to nothing
        model = decided()
        model.generation_config.eos_token_id = None
        seen = []
        gates = module.learn_gates(
            model,
            greedy_questions(module, model),
            60,
            sinks=0,
            recent=recent,
            new_tokens=6,
            rate=0.05,
            penalty=0.5,
            report=lambda step, reward, gates, seen=seen: seen.append(reward),
        )
        assert gates.shape == (3, 2) and (gates >= 0).all() and (gates <= 1).all()
        means[recent], rewards[recent] = float(gates.mean()), seen
    assert means[64] < 0.05 and sum(rewards[64]) > 40
    assert rewards[2][0] > 0.5 and means[2] > 0.3


def test_no_reward_no_change():
    module, model = example("learn_gates_rl"), toy()
    questions = [module.Question(batches(20)(step)[0], lambda answer: False) for step in range(3)]
    gates = module.learn_gates(model, questions.__getitem__, 3, weight_decay=0.0, new_tokens=2)
    assert torch.equal(gates, torch.ones(3, 2))


def test_gates_see_the_same_with_and_without_a_cache():
    module, model = example(), toy()
    ids = batches(40)(0)[0]
    gates = module.Gates(model, 4, 8)
    gates.values.data.fill_(0.3)
    with module.gated(model, gates), torch.no_grad():
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "output_logits": True}
        outs = [model.generate(ids, use_cache=c, return_dict_in_generate=True, **options) for c in (True, False)]
    torch.testing.assert_close(torch.stack(outs[0].logits), torch.stack(outs[1].logits), atol=1e-5, rtol=1e-5)
