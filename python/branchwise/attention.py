"""How the kernels reach a transformers model: an attention function that reads a per-forward plan.

The function is registered under the name "branchwise" on first use; a model uses it only inside
:func:`use_attention`. No mask function is registered for the name, so transformers builds no mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from . import ops

if TYPE_CHECKING:
    from .cache import KVStore
from .tree import TokenTree

NAME = "branchwise"
# Layer types whose mask the kernels express: the prefix, a window by position, and the tree.
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}


@dataclass
class AttentionPlan:
    """What one forward tells every attention layer; travels as the keyword ``branchwise_plan`` of ``model(...)``."""

    seq_lens: Tensor  # i32[B], tokens in the cache before this forward
    tree_mask: Tensor | None  # i64[B, N, W], None: causal
    positions: Tensor  # i64[B, T]
    tree: TokenTree | None = None  # what is being verified
    prompt_ends: Tensor | None = None  # i32[B], of a prompt's chunk: how many of the T tokens are each row's own
    last_chunk: bool = False  # of a prompt: no row has more
    by_path: bool = False  # keys are summed in the order of each node's text
    kv: LayerPolicy | None = None  # decides what layers attend to and keep
    store: KVStore | None = None
    calls: int = 0  # attention layers that ran


@dataclass
class LayerCall:
    """One attention layer of one forward. The new keys and values are in the store already."""

    layer: int
    query: Tensor  # [B, Hq, T, D]
    plan: AttentionPlan
    keys: Tensor  # the layer's slots, or pages
    values: Tensor
    scale: float | None
    window: int
    sinks: Tensor | None
    softcap: float
    lens: Tensor  # i32[B] or i32[B, Hkv], slots before the new tokens
    page_table: Tensor | None
    shares_pages: bool = False  # rows may have pages in common
    scales: tuple[Tensor | None, Tensor | None] = (None, None)  # of keys and values in e4m3

    def dense(self) -> tuple[Tensor, Tensor]:
        """Attention to all slots that are left: out [B, Hq, T, D], lse f32[B, Hq, T]."""
        where = self.query, self.keys, self.values, self.lens
        options: dict[str, Any] = dict(scale=self.scale, window=self.window, sinks=self.sinks, softcap=self.softcap)
        options["key_scale"], options["value_scale"] = self.scales
        if self.shares_pages:
            assert self.page_table is not None
            return ops.cascade_attention(*where, self.page_table, self.plan.tree_mask, **options)
        op = ops.path_attention if self.plan.by_path else ops.tree_attention
        return op(*where, self.plan.tree_mask, page_table=self.page_table, **options)

    def sparse(self, indices: Tensor | None, counts: Tensor | None, **options: Any) -> Tensor:
        """:func:`branchwise.ops.sparse_attention` to a part of them: out [B, Hq, T, D]."""
        return ops.sparse_attention(
            self.query,
            self.keys,
            self.values,
            self.lens,
            indices,
            counts,
            tree_mask=self.plan.tree_mask,
            page_table=self.page_table,
            scale=self.scale,
            sinks=self.sinks,
            softcap=self.softcap,
            **options,
        )[0]


class LayerPolicy(Protocol):
    """What :class:`branchwise.kv.KVSession` is to the attention function."""

    def before(self, tokens: Tensor, positions: Tensor) -> None:
        """A forward is about to run."""
        ...

    def attend(self, call: LayerCall) -> Tensor:
        """out [B, Hq, T, D] of one layer."""
        ...


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    branchwise_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: ``key`` and ``value`` are the whole slots that :class:`KVStore` returned."""
    if branchwise_plan is None:
        raise RuntimeError(
            "the attention implementation 'branchwise' works only inside a branchwise decoder; "
            "for a plain forward call model.set_attn_implementation('sdpa')"
        )
    plan = branchwise_plan
    plan.calls += 1
    index = getattr(module, "layer_idx", 0)
    layer = plan.store.layers[index] if plan.kv is not None and plan.store is not None else None
    shared = None if plan.store is None else plan.store.shared_pages
    scales = None if plan.store is None else plan.store.scales
    call = LayerCall(
        index,
        query,
        plan,
        key,
        value,
        scaling,
        sliding_window or 0,
        None if s_aux is None else s_aux.detach().float().contiguous(),
        softcap or 0.0,
        plan.seq_lens if layer is None else layer.lens,
        shared if layer is None else layer.page_table,
        shared is not None,
        (None, None) if scales is None else scales[index],
    )
    out = call.dense()[0] if plan.kv is None else plan.kv.attend(call)
    return out.transpose(1, 2), None


def pack_mask(ancestors: Tensor) -> Tensor:
    """i64[B, N, ceil(N/64)] ancestor bits from bool[B, N, N], as :func:`branchwise.ops.tree_attention` takes them."""
    B, N, _ = ancestors.shape
    padded = np.zeros((B, N, -(-N // 64) * 64), np.uint8)
    padded[..., :N] = ancestors.numpy()
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view(np.int64))


@contextmanager
def use_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention layers call :func:`attention_forward`; afterwards it is as before."""
    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, attention_forward)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    # The attribute behind the property: setting the property also rewrites nested configurations.
    before = {key: config.__dict__.get("_attn_implementation_internal") for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def check_supported(model: PreTrainedModel, on_cuda: bool = False) -> None:
    """Refuses, with the reason, a model whose attention or state the kernels cannot serve.

    Args:
        model: of a decoder.
        on_cuda: the decoder can have its model on a GPU.

    Raises:
        ValueError: encoder-decoder, recurrent state, an attention that bypasses the attention interface, bidirectional
            or chunked attention, or compressed (MLA) keys.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; branchwise decodes decoder-only models")
    recurrent = sorted(layer_types & {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid"})
    if getattr(model, "_is_stateful", False) or recurrent or hasattr(config, "layers_block_type"):
        what = f" ({', '.join(recurrent)} layers)" if recurrent else ""
        raise ValueError(f"{name} keeps recurrent state{what}, which cannot be rolled back when a draft is rejected")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{name} does not use the transformers attention interface, so its attention cannot be replaced"
        )
    if layer_types - _LAYER_TYPES:
        raise ValueError(
            f"{name} has layers of type {', '.join(sorted(layer_types - _LAYER_TYPES))}; "
            f"branchwise supports {', '.join(sorted(_LAYER_TYPES))}"
        )
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} stores compressed keys (MLA), which the KV store cannot hold yet")
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) == "all":
        raise ValueError(f"{name} is configured with bidirectional attention; branchwise decodes causal models")
    if model.device.type != "cpu" and not (on_cuda and model.device.type == "cuda" and ops.CUDA_LOADED):
        reason = "was built without CUDA" if on_cuda and model.device.type == "cuda" else "decodes so on the CPU only"
        raise ValueError(f"{name} is on {model.device}; branchwise {reason}: call model.to('cpu')")
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} has dtype {model.dtype}; branchwise supports float32, bfloat16 and float16")
