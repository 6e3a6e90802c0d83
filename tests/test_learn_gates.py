"""examples/learn_gates.py on a toy model."""

import importlib.util
from pathlib import Path

import torch
import transformers as tf

import branchwise as bw
import tiny
from branchwise import kv

PATH = Path(__file__).parent.parent / "examples" / "learn_gates.py"


def example():
    spec = importlib.util.spec_from_file_location("learn_gates", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
