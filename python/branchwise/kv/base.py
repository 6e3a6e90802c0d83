"""What a KV policy is: it decides which slots a layer attends to, and which it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import LayerCall
from ..cache import KVStore
from ..forward import StoredModel
from ..tree import RowTree


class KVPolicy(Protocol):
    """Options of a policy. One object may serve many sessions; what belongs to a batch lives in the session."""

    def begin(self, model: PreTrainedModel, store: KVStore) -> KVSession:
        """Starts a batch."""
        ...


class KVSession:
    """A batch under a policy: the policy that changes nothing, and what the others override.

    Everything a session decides must be a function of a row's text and of positions, never of how many tokens a
    forward had: then a tree of guesses is verified as if its tokens had come one at a time, and speculation over the
    sparse model gives exactly the sparse model's text.
    """

    def __init__(self, model: PreTrainedModel, store: KVStore) -> None:
        self.model, self.store = model, store

    def prefill(self, target: StoredModel, prompts: Sequence[Tensor]) -> Tensor:
        """Runs the prompts (i64 ids per row): logits [B, 1, V] after the last token of each."""
        return target.extend(prompts)

    def before(self, tokens: Tensor, positions: Tensor) -> None:
        """A forward of i64[B, T] tokens is about to run."""

    def attend(self, call: LayerCall) -> Tensor:
        """out [B, Hq, T, D] of one layer of one forward."""
        return call.dense()[0]

    def trim(self, tree: RowTree) -> RowTree:
        """A row's tree without nodes that cannot be verified in the same forward as those above them."""
        return tree

    def max_depth(self) -> Sequence[int] | None:
        """How far below the root each row's tree may reach; None: any depth."""
        return None

    def committed(self, nodes: Tensor, count: Tensor) -> None:
        """The store has just kept nodes i32[B, A] of the last forward, ``count`` i32[B] of them per row."""

    def keep(self, rows: Sequence[int]) -> None:
        """The other rows have finished."""

    def close(self) -> None:
        """The batch has ended, normally or not."""


def check_layers(model: PreTrainedModel) -> None:
    """Refuses models whose layers share keys.

    Raises:
        ValueError: they do.
    """
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise ValueError(
            f"{type(model).__name__} has layers that read the keys of earlier ones; a KV policy needs layers with "
            "keys of their own"
        )


def windowed_layers(model: PreTrainedModel) -> set[int]:
    """Layers whose attention has a window of its own."""
    config = model.config.get_text_config()
    if not getattr(config, "sliding_window", None):
        return set()
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {index for index, kind in enumerate(types) if kind == "sliding_attention"}


def full_layers(model: PreTrainedModel) -> set[int]:
    """Layers whose attention has no window of its own."""
    return set(range(model.config.get_text_config().num_hidden_layers)) - windowed_layers(model)


def resolve_budget(budget: int | float, lengths: Tensor) -> Tensor:
    """Slots per row, i64[B], from a number of tokens or a ratio of the rows' lengths i32[B]."""
    if isinstance(budget, float):
        return (lengths.double() * budget).floor().long().clamp(min=1)
    return torch.full(lengths.shape, budget, dtype=torch.int64)


def check_budget(name: str, budget: int | float, least: int = 1) -> None:
    """Raises ValueError unless ``budget`` is at least ``least`` tokens, or a ratio in (0, 1]."""
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"{name} must be a ratio in (0, 1] or a number of tokens, got {budget}")
    elif budget < least:
        raise ValueError(f"{name} must be at least {least} tokens, got {budget}")


def check_page_size(page_size: int) -> None:
    """Raises ValueError unless slots, of which stores hold multiples of 64, divide into such pages."""
    if page_size < 1 or 64 % page_size:
        raise ValueError(f"page_size must be a divisor of 64, got {page_size}")


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'in [{low}, {high}]'}, got {value}")
