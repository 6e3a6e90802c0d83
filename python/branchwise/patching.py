"""Putting a model under a KV policy, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from .attention import check_supported
from .decoding import TreeSpeculation
from .kv import KVPolicy, policy_of, set_policy


@contextmanager
def sparse_kv(model: PreTrainedModel, policy: KVPolicy) -> Iterator[None]:
    """Inside, ``model.generate`` decodes under a KV policy; afterwards the model is as before.

    ``model.generate(...)`` is plain decoding under the policy (greedy, or sampling with noise keyed by position, as
    :class:`branchwise.PositionKeyedSampler` does); ``custom_generate=TreeSpeculation(...)`` speculates over the sparse
    model and gives the same text. Contexts of one model do not nest.

    Raises:
        ValueError: an unsupported model, or one that is under a policy already.
    """
    patch(model, policy)
    try:
        yield
    finally:
        unpatch(model)


def patch(model: PreTrainedModel, policy: KVPolicy) -> None:
    """Puts a model under a KV policy until :func:`unpatch`; see :func:`sparse_kv`.

    Raises:
        ValueError: an unsupported model, or one that is under a policy already.
    """
    check_supported(model)
    if policy_of(model) is not None:
        raise ValueError(f"this {type(model).__name__} is under a KV policy already: call branchwise.unpatch(model)")
    set_policy(model, policy)
    model.__dict__["generate"] = partial(_generate, model.generate)


def unpatch(model: PreTrainedModel) -> None:
    """Undoes :func:`patch`; without one, nothing happens."""
    if policy_of(model) is not None:
        set_policy(model, None)
        model.__dict__.pop("generate", None)


def _generate(generate: Any, *args: Any, custom_generate: Any = None, **kwargs: Any) -> Any:
    decoder = custom_generate if custom_generate is not None else TreeSpeculation(drafter="none", max_nodes=1)
    return generate(*args, custom_generate=decoder, **kwargs)
