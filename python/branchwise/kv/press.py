"""Any kvpress press as a policy: its scores, our eviction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from .evicting import EvictingSession, Keep


class FromPress:
    """Keeps the slots that a press of NVIDIA's kvpress scores highest, and frees the others.

    Works with every press that has ``score(module, hidden_states, keys, values, attentions, kwargs) -> [B, Hkv, S]``
    and ``compression_ratio`` (``ScorerPress`` and what derives from it). Evicts after the prompt, per KV head. Prompts
    of a batch are scored one by one, so presses need not know about padding. Exact at a ratio of 0.

    Args:
        press: the press; kvpress itself is not imported.
        page_size: slots allocated together per head.

    Raises:
        ValueError: a press without these attributes.
    """

    def __init__(self, press: Any, page_size: int = 16) -> None:
        for attribute in ("score", "compression_ratio"):
            if not hasattr(press, attribute):
                raise ValueError(f"press must have {attribute}; {type(press).__name__} has none")
        self.press, self.page_size = press, page_size

    def begin(self, model: PreTrainedModel, store: KVStore) -> FromPressSession:
        return FromPressSession(model, store, self)


class FromPressSession(EvictingSession):
    def __init__(self, model: PreTrainedModel, store: KVStore, options: FromPress) -> None:
        super().__init__(model, store, 0, options.page_size)
        self.press = options.press
        # Of a prompt so far, by layer: what went into the attention module, forward by forward.
        self._inputs: dict[int, list[tuple[Tensor, dict[str, Any]]]] = {}
        self._modules: dict[int, torch.nn.Module] = {}
        self._ends: dict[int, list[Tensor]] = {}  # and how many of its tokens were each row's own
        self._hooks = [
            module.register_forward_pre_hook(self._note, with_kwargs=True)
            for module in model.modules()
            if hasattr(module, "layer_idx") and "attention" in type(module).__name__.lower()
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def prompt_chunk(self, call: LayerCall, lse: Tensor, ends: Tensor) -> None:
        self._ends.setdefault(call.layer, []).append(ends)

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep:
        inputs, ends = self._inputs.pop(call.layer), self._ends.pop(call.layer)
        scores = call.keys.new_full(call.keys.shape[:3], -torch.inf, dtype=torch.float32)
        budgets = (lengths.double() * (1 - self.press.compression_ratio)).long().clamp(min=1)
        for row, n in enumerate(lengths.tolist()):
            hidden, kwargs = _own_tokens(inputs, [int(end[row]) for end in ends], row)
            keys, values = (cache[row : row + 1, :, :n] for cache in (call.keys, call.values))
            scores[row, :, :n] = self.press.score(self._modules[call.layer], hidden, keys, values, None, kwargs)[0]
        at = lengths[:, None].contiguous()
        heads = scores.shape[1]
        indices, counts = ops.select_pages(
            scores[:, None].contiguous(), at, at, budgets[:, None, None].expand(-1, 1, heads).int().contiguous()
        )
        return indices[:, 0].contiguous(), counts[:, 0].contiguous()

    def verified(self, call: LayerCall, lse: Tensor) -> None:
        self._inputs.pop(call.layer, None)

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        index = int(module.layer_idx)  # type: ignore[arg-type]
        self._modules[index] = module
        self._inputs.setdefault(index, []).append((hidden, kwargs))


def _own_tokens(
    inputs: list[tuple[Tensor, dict[str, Any]]], ends: list[int], row: int
) -> tuple[Tensor, dict[str, Any]]:
    """One row's own tokens of all chunks: hidden states [1, n, H], and keyword arguments with its angles."""
    hidden = torch.cat([states[row : row + 1, :end] for (states, _), end in zip(inputs, ends, strict=True)], dim=1)
    kwargs = dict(inputs[-1][1])
    if "position_embeddings" in kwargs:
        parts = [
            [angles[row % len(angles)][None, :end] for angles in chunk["position_embeddings"]]
            for (_, chunk), end in zip(inputs, ends, strict=True)
        ]
        kwargs["position_embeddings"] = tuple(torch.cat(angles, dim=1) for angles in zip(*parts, strict=True))
    return hidden, kwargs
