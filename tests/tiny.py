"""Tiny random models of every supported architecture: two or more layers, a vocabulary of 128 tokens."""

from __future__ import annotations

from functools import cache

import torch
import transformers as tf

_BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_BASE),
    "qwen3": lambda: tf.Qwen3Config(**_BASE, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(
        **_BASE, head_dim=16, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=10.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**_BASE, head_dim=16, sliding_window=8, layer_types=_SLIDING),
    "gemma4": lambda: tf.Gemma4TextConfig(
        **{**_BASE, "num_hidden_layers": 4},
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=32,  # torch computes the end of a tensor by other routines: whole vectors
        vocab_size_per_layer_input=128,
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**{k: v for k, v in _BASE.items() if k != "num_key_value_heads"}),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_BASE, head_dim=16, sliding_window=8, layer_types=_SLIDING, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_BASE, **_MOE, head_dim=16),
    "mistral": lambda: tf.MistralConfig(**_BASE, sliding_window=8),
    "phi3": lambda: tf.Phi3Config(**_BASE),
    "olmo2": lambda: tf.Olmo2Config(**_BASE),
    "smollm3": lambda: tf.SmolLM3Config(**_BASE),
    "granite": lambda: tf.GraniteConfig(**_BASE),
}


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """The same weights for the same name, in eval mode."""
    torch.manual_seed(sum(map(ord, name)))
    config = CONFIGS[name]()
    # transformers before 5.23 gives Gemma 2 torch's SDPA, which leaves the soft cap out.
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    built = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager" if softcap else None)
    built = built.to(dtype).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # the usual 0.02 init leaves logits flat and argmax a matter of rounding
            if parameter.dim() >= 2:
                parameter.mul_(4)
    built.generation_config.pad_token_id = 0
    built.generation_config.eos_token_id = 2
    return built


def prompts(batch: int, seed: int, longest: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded random token ids and their mask."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (batch,), generator=g)
    ids = torch.randint(3, 20, (batch, int(lengths.max())), generator=g)
    mask = torch.arange(ids.shape[1])[None, :] >= ids.shape[1] - lengths[:, None]
    return torch.where(mask, ids, 0), mask.long()
