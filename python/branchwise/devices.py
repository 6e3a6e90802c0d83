"""Tensors that the host makes and a device reads: lengths, trees, noise."""

from __future__ import annotations

import torch
from torch import Tensor


class Mirror:
    """Copies a host tensor to a device once, however many layers ask for it."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._copy: Tensor | None = None

    def __call__(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device == device:
            return tensor
        if self._of is not tensor or self._copy is None or self._copy.device != device:
            self._of, self._copy = tensor, tensor.to(device)
        return self._copy


def to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def wait_for(tensor: Tensor) -> None:
    """Returns when the tensor has been computed, so that a clock read next tells how long that took."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
