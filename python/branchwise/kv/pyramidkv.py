"""PyramidKV: SnapKV with more slots in lower layers (card kv-eviction-baselines)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import LayerCall
from ..cache import KVStore
from .base import check_range
from .snapkv import SnapKV, SnapKVSession


class PyramidKV(SnapKV):
    """SnapKV whose budget falls from layer to layer and is ``budget`` on average (Cai et al. 2024, arXiv 2406.02069).

    Args:
        budget, window, kernel, pooling, page_size: of :class:`SnapKV`.
        beta: the last layer keeps ``(budget - window) // beta`` tokens beside the window; 1 makes all layers equal.

    Raises:
        ValueError: as :class:`SnapKV`, or ``beta`` below 1.
    """

    def __init__(
        self,
        budget: int | float,
        window: int = 32,
        kernel: int = 5,
        pooling: Literal["avg", "max"] = "avg",
        page_size: int = 16,
        beta: int = 20,
    ) -> None:
        super().__init__(budget, window, kernel, pooling, page_size)
        check_range("beta", beta, 1)
        self.beta = beta

    def begin(self, model: PreTrainedModel, store: KVStore) -> PyramidKVSession:
        return PyramidKVSession(model, store, self)


class PyramidKVSession(SnapKVSession):
    options: PyramidKV

    def budgets(self, call: LayerCall, scores: Tensor, before: Tensor, base: Tensor) -> Tensor:
        layers = self.model.config.get_text_config().num_hidden_layers
        rows = [
            layer_budget(int(b), int(n), call.layer, layers, self.options.beta)
            for b, n in zip(base, before, strict=True)
        ]
        return super().budgets(call, scores, before, torch.tensor(rows))


def layer_budget(base: int, length: int, layer: int, layers: int, beta: int) -> int:
    """Slots of a layer beside the window, of ``length`` there are, when layers keep ``base`` on average."""
    if length < 2 * base or layers == 1:
        return base
    least = base // beta
    most = 2 * base - least
    if most >= length:
        most, least = length, 2 * base - length
    return most - layer * ((most - least) // (layers - 1))
