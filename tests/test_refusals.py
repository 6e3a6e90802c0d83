"""What TreeSpeculation cannot do is refused, with the reason."""

import numpy as np
import pytest
import torch
import transformers as tf

import branchwise as bw
import tiny
from branchwise.cache import CACHE_NAME
from random_drafter import RandomTrees
from test_tree_speculation import decoder, run


def bad_requests():
    ids, mask = tiny.prompts(2, 30)
    gap = torch.ones_like(ids)
    gap[0, 1] = 0

    def call(**options):
        return lambda: run(
            tiny.model("llama"), options.pop("ids", ids), options.pop("mask", mask), decoder(), **options
        )

    yield "asks for beam_search", call(num_beams=2)
    yield "asks for assisted_generation", call(prompt_lookup_num_tokens=3)
    yield "output_attentions=True is not supported", call(output_attentions=True, return_dict_in_generate=True)
    yield "attention_mask\\[0\\] must be zeros, then ones", call(mask=gap)
    yield (
        "attention_mask\\[1\\] must be zeros, then ones",
        call(mask=torch.tensor([[1] * ids.shape[1], [0] * ids.shape[1]])),
    )
    yield "max_nodes must lie between 1 and 1024, got 0", lambda: bw.TreeSpeculation(max_nodes=0)
    yield "suffix, token_recycling, trie, got 'x'", lambda: bw.TreeSpeculation("x")


@pytest.mark.filterwarnings("ignore:`return_dict_in_generate`")
@pytest.mark.parametrize("message, call", list(bad_requests()), ids=lambda x: x if isinstance(x, str) else "")
def test_refuses_requests(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_a_filled_cache_and_other_inputs():
    model = tiny.model("llama")
    ids, _ = tiny.prompts(1, 31)
    spec = decoder()
    cache = model(ids, **{CACHE_NAME: tf.DynamicCache()})[CACHE_NAME]
    with pytest.raises(ValueError, match=f"{CACHE_NAME} must be empty"):
        spec(model, ids, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="it cannot pass pixel_values to the model"):
        spec(model, ids, pixel_values=torch.zeros(1))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 8}


def t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes))


def mamba():
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))


def qwen3_next():
    config = tf.Qwen3NextConfig(
        **SMALL,
        **EXPERTS,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention"],
    )
    return tf.Qwen3NextForCausalLM(config)


def deepseek():
    config = tf.DeepseekV3Config(
        **SMALL,
        **EXPERTS,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
    )
    return tf.DeepseekV3ForCausalLM(config)


def bloom():
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))


def float64():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, intermediate_size=32)).double()


@pytest.mark.parametrize(
    "message, build",
    [
        ("encoder-decoder", t5),
        ("recurrent state", mamba),
        (r"recurrent state \(linear_attention", qwen3_next),
        ("compressed keys", deepseek),
        ("does not use the transformers attention interface", bloom),
        ("dtype torch.float64", float64),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refuses_models(message, build):
    model = build().eval()
    with pytest.raises(ValueError, match=message):
        decoder()(model, torch.tensor([[1, 2, 3]]), generation_config=tf.GenerationConfig(max_new_tokens=3))


def test_attention_name_outside_a_decoder_is_refused():
    from branchwise.attention import use_attention

    model = tiny.model("llama")
    with use_attention(model), pytest.raises(RuntimeError, match="works only inside a branchwise decoder"):
        model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    "message, tree",
    [
        ("root must be the row's last token 7, got 8", bw.RowTree.root(8)),
        ("tokens must lie between 0 and 127, got 7 to 128", bw.RowTree.chain(7, [128], np.ones(1))),
        ("tokens must lie between 0 and 127, got -1 to 7", bw.RowTree.chain(7, [-1], np.ones(1))),
    ],
)
def test_refuses_drafters_that_break_the_protocol(message, tree):
    class Broken(RandomTrees):
        def propose(self, budgets):
            return [tree]

    model, ids = tiny.model("llama"), torch.tensor([[1, 5, 9]])
    bias = {"sequence_bias": [[[7], 100.0]]}  # the model says 7 and nothing else
    with pytest.raises(ValueError, match=message):
        run(model, ids, torch.ones_like(ids), bw.TreeSpeculation(Broken([[]])), **bias)


def test_trees_beyond_the_budget_are_cut():
    class Greedy(RandomTrees):
        def propose(self, budgets):
            return [self._tree(i, 50) for i in range(len(budgets))]

    ids, mask = tiny.prompts(2, 40)
    plain = run(tiny.model("llama"), ids, mask)
    spec = bw.TreeSpeculation(Greedy([row[ids.shape[1] :].tolist() for row in plain]), max_nodes=5, adaptive=False)
    assert torch.equal(run(tiny.model("llama"), ids, mask, spec), plain)
    assert spec.stats.drafted <= 4 * spec.stats.row_forwards
