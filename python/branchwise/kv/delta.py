"""DELTA: a few layers attend to everything and choose the pages of the layers above them (card delta)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall, use_attention
from ..cache import KVStore
from ..forward import StoredModel
from .base import KVSession, check_range
from .selecting import SelectingSession


class DELTA:
    """Planner layers attend to everything, and their attention selects the pages that the layers up to the next planner
    attend to (Entezari Zarch et al. 2025, arXiv 2510.09883).

    A page's score is the sum over its tokens of the largest probability that any query head gives them; one list for
    all heads. Nothing is evicted. Exact while a row has at most ``budget`` tokens, and below ``min_length``.

    Args:
        budget: tokens attended to in sparse layers, recent ones included; rounded up to pages.
        planners: layers that plan; the default is the published set for 28 layers, :func:`place_planners` finds others.
        warm_up: the first layers attend to everything and plan nothing.
        page_size, sinks, recent, min_length: as for :class:`branchwise.kv.Quest`.

    Raises:
        ValueError: an option outside its range; on use, planners that are not layers of the model behind the warm-up,
            or a model whose layers share keys.
    """

    def __init__(
        self,
        budget: int = 1024,
        planners: Sequence[int] = (2, 14, 22),
        warm_up: int = 2,
        page_size: int = 16,
        sinks: int = 0,
        recent: int = 128,
        min_length: int | None = None,
    ) -> None:
        check_range("page_size", page_size, 1)
        check_range("warm_up", warm_up, 0)
        check_range("sinks", sinks, 0)
        check_range("recent", recent, 0)
        check_range("budget", budget, recent + 2 * page_size)
        if not planners or min(planners) < warm_up:
            raise ValueError(f"planners must hold at least one layer from {warm_up} on, got {list(planners)}")
        self.budget, self.planners, self.warm_up = budget, frozenset(planners), warm_up
        self.page_size, self.sinks, self.recent, self.min_length = page_size, sinks, recent, min_length

    def begin(self, model: PreTrainedModel, store: KVStore) -> DELTASession:
        return DELTASession(model, store, self)


class DELTASession(SelectingSession):
    options: DELTA

    def __init__(self, model: PreTrainedModel, store: KVStore, options: DELTA) -> None:
        super().__init__(model, store, options)
        layers = model.config.get_text_config().num_hidden_layers
        if max(options.planners) >= layers:
            raise ValueError(f"planners must lie below the model's {layers} layers, got {sorted(options.planners)}")
        self._plan: tuple[Tensor, Tensor] | None = None  # of the planner below, in this forward

    def before(self, tokens: Tensor, positions: Tensor) -> None:
        self._plan = None

    def attend(self, call: LayerCall) -> Tensor:
        if call.plan.prompt_ends is not None or call.window or not self.of_round(call).pays:
            return call.dense()[0]
        if call.layer in self.options.planners:
            out, lse = call.dense()
            self._plan = self.choose(call, page_masses(call, lse, self.options.page_size))
            return out
        if call.layer < self.options.warm_up or self._plan is None:
            return call.dense()[0]
        return call.sparse(*self._plan, unit=self.options.page_size)


def page_masses(call: LayerCall, lse: Tensor, page_size: int) -> Tensor:
    """f32[B, T, 1, N]: per page, the sum over tokens of the largest probability among the heads."""
    mass = ops.attention_mass(
        call.query,
        call.keys,
        call.lens,
        lse=lse,
        reduce="max",
        per_token=True,
        scale=call.scale,
        softcap=call.softcap,
    ).amax(2)  # [B, T, S]
    B, T, S = mass.shape
    pages = -(-S // page_size)
    mass = torch.nn.functional.pad(mass, (0, pages * page_size - S))
    return mass.view(B, T, 1, pages, page_size).sum(-1)


class _Watch(KVSession):
    """Attention of the last token in every layer, while a text is read."""

    def __init__(self, model: PreTrainedModel, store: KVStore) -> None:
        super().__init__(model, store)
        self.masses: list[Tensor] = []

    def attend(self, call: LayerCall) -> Tensor:
        out, lse = call.dense()
        last = LayerCall(**{**vars(call), "query": call.query[:, :, -1:], "lens": call.lens + call.query.shape[2] - 1})
        self.masses.append(page_masses(last, lse[:, :, -1:].contiguous(), 1)[0, 0, 0])
        return out


@torch.no_grad()
def place_planners(model: PreTrainedModel, text: Tensor, count: int = 3, first: int = 2) -> list[int]:
    """Planner layers for :class:`DELTA`: ``first``, and the layers before which attention changes most.

    One forward over a calibration text; the change between layers l - 1 and l is one minus the cosine of their last
    token's attention (largest probability among the heads). Peaks are taken largest first, at least
    ``layers // (2 * count)`` layers apart.

    Args:
        text: i64[n] token ids, n >= 2.
        count: planners, ``first`` included.

    Raises:
        ValueError: a text of fewer than two tokens, or ``count`` below 1.

    Source: card delta, "Placement of planners".
    """
    if text.dim() != 1 or len(text) < 2:
        raise ValueError(f"text must be one row of at least two token ids, got shape {tuple(text.shape)}")
    check_range("count", count, 1)
    store = KVStore(1, len(text))
    watch = _Watch(model, store)
    with use_attention(model):
        StoredModel(model, store, kv=watch).forward(text[None], torch.arange(len(text))[None], wanted=[len(text) - 1])
    masses = torch.stack(watch.masses)
    change = 1 - torch.cosine_similarity(masses[1:], masses[:-1], dim=-1)  # of layers 1, 2, ...
    planners, apart = [first], max(1, len(masses) // (2 * count))
    for layer in (torch.argsort(change, descending=True) + 1).tolist():
        if len(planners) == count:
            break
        if layer > first and all(abs(layer - other) >= apart for other in planners):
            planners.append(layer)
    return sorted(planners)
