"""Masked-diffusion models as their users have them: remote code, shifted logits, weights in stock models."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from branchwise.diffusion import BlockDecoder, DiffusionSpec, FreeDave, spec_of
from branchwise.ops.diffusion import confidence_reference, step_reference
from test_diffusion import MASK, V, decode, model, predict, prompts


class LLaDAModelLM(tf.PreTrainedModel):
    """Remote code: its own attention, which nothing can replace, and no argument but the ids."""

    config_class = tf.PretrainedConfig

    def __init__(self, inner):
        config = tf.PretrainedConfig(mask_token_id=MASK, vocab_size=V, is_encoder_decoder=False)
        config.model_type = "llada"
        super().__init__(config)
        self.inner, self.calls = inner, 0

    def forward(self, input_ids):
        self.calls += 1
        return self.inner(input_ids)


def test_llada_style_remote_code():
    """Asked about whole texts; the text is that of the same weights on our kernels."""
    inner = model("full")
    remote = LLaDAModelLM(inner).eval()
    ids, mask = prompts()
    wanted = decode(inner, BlockDecoder(None, 8), ids, mask)
    config = tf.GenerationConfig(max_length=ids.shape[1] + 19, pad_token_id=0, do_sample=False)
    for decoder in (BlockDecoder(None, 8), FreeDave(None, 8, block_length=8)):
        out = decoder(remote, ids, generation_config=config, attention_mask=mask)
        assert torch.equal(out, wanted)
        assert decoder.stats.forwards == remote.calls
        remote.calls = 0
    end = int(wanted[0, ids.shape[1] + 4])
    config = tf.GenerationConfig(max_new_tokens=19, pad_token_id=0, do_sample=False, eos_token_id=end)
    text = FreeDave(None, 8, block_length=8)(remote, ids[:1], generation_config=config)[0].tolist()
    assert text == wanted[0, : ids.shape[1] + wanted[0, ids.shape[1] :].tolist().index(end) + 1].tolist()
    config = tf.GenerationConfig(max_length=30, pad_token_id=0, do_sample=False)
    with pytest.raises(ValueError, match="cache must be 'none' for LLaDAModelLM"):
        BlockDecoder(None, 8, "dual")(remote, ids, generation_config=config, attention_mask=mask)


def shifted_brute_force(m, prompt, new, block):
    text = prompt.tolist() + [MASK] * new
    for begin in range(len(prompt), len(text), block):
        for _ in range(min(block, len(text) - begin)):
            logits = predict(m, text, text, 0, len(text), "full", block, "none")
            logits = torch.cat([logits[:1], logits[:-1]])
            tokens, scores = confidence_reference(logits, torch.tensor([MASK]))
            text = step_reference(
                text, tokens.tolist(), scores.tolist(), len(prompt), 1, MASK, block, "count", 0.0
            )  # fmt: skip
    return text


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_dream_style_shift(cache):
    """Qwen2 modules, logits one place late. With caches, against static decoding only."""
    torch.manual_seed(3)
    config = tf.Qwen2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    m = tf.Qwen2ForCausalLM(config).eval()
    m.lm_head.weight.data *= 6
    spec = DiffusionSpec(mask_id=MASK, shift=1)
    ids, mask = prompts()
    static = BlockDecoder(None, 8, cache, spec=spec)
    out = decode(m, static, ids, mask)
    dave = FreeDave(None, 8, block_length=8, cache=cache, spec=spec)
    assert torch.equal(decode(m, dave, ids, mask), out) and dave.stats.forwards < static.stats.forwards
    if cache == "none":
        for row in range(3):
            own = mask[row].bool()
            assert out[row, -19 - int(own.sum()) :].tolist() == shifted_brute_force(m, ids[row, own], 19, 8)


def test_sdar_style_weights_in_a_stock_model():
    """The same weights in Qwen3ForCausalLM, told what they are."""
    own = model()
    config = tf.Qwen3Config(
        **{k: v for k, v in own.config.to_dict().items() if k not in ("model_type", "architectures")}
    )
    stock = tf.Qwen3ForCausalLM(config).eval()
    stock.load_state_dict(own.state_dict())
    ids, mask = prompts()
    spec = spec_of(stock, mask_id=MASK, attention="block_causal", block_size=4)
    assert torch.equal(decode(stock, FreeDave(spec=spec), ids, mask), decode(own, FreeDave(), ids, mask))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is no masked-diffusion model that is known"):
        decode(stock, FreeDave(), ids, mask)


@pytest.mark.parametrize(
    "kind, fields, spec",
    [
        ("llada", {}, DiffusionSpec(126336)),
        ("Dream", {"mask_token_id": 151666}, DiffusionSpec(151666, shift=1)),
        ("sdar", {"mask_token_id": 9, "block_size": 8}, DiffusionSpec(9, "block_causal", 8)),
        ("trado", {"block_size": 4}, DiffusionSpec(151669, "block_causal", 4)),
        ("bd3lm", {"vocab_size": 100, "block_size": 16}, DiffusionSpec(99, "block_causal", 16)),
    ],
)
def test_specs_of_families(kind, fields, spec):
    config = tf.PretrainedConfig(**fields)
    config.model_type = kind

    class Stand:
        pass

    stand = Stand()
    stand.config = config
    assert spec_of(stand) == spec
