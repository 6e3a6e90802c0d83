"""Which policy a model is under."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .base import KVPolicy

_POLICIES: WeakKeyDictionary[PreTrainedModel, KVPolicy] = WeakKeyDictionary()


def policy_of(model: PreTrainedModel) -> KVPolicy | None:
    """The policy that :func:`set_policy` gave the model, or None."""
    return _POLICIES.get(model)


def set_policy(model: PreTrainedModel, policy: KVPolicy | None) -> None:
    """Puts a model under a policy, or under none; decoders look it up when they start."""
    if policy is None:
        _POLICIES.pop(model, None)
    else:
        _POLICIES[model] = policy
