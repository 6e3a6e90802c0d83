"""Where the CUDA ops run: on a device, and everywhere in the emulator, which executes the same sources on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from branchwise import forward, layers, ops
from branchwise.ops._load import LIBRARY_DIR

EMULATED = LIBRARY_DIR / "libbranchwise_emulated.so"
ON_DEVICE = ops.CUDA_LOADED and torch.cuda.is_available()


class Device:
    """The ops of branchwise, run by CUDA kernels: takes CPU tensors and hands back CPU tensors."""

    def __init__(self, name: str):
        self.emulated = name == "emulated"
        self.ops = torch.ops.branchwise_emulated if self.emulated else torch.ops.branchwise

    @contextmanager
    def active(self):
        """While it lasts, the ops of branchwise are those of this device, for whoever calls them."""

        # On a device a model's linear layers stay torch's where they are faster; the emulator's weights are on the CPU.
        def linears(model, where_faster):
            return nullcontext() if where_faster and self.emulated else layers.InvariantLinears(model, where_faster)

        with (
            mock.patch.object(torch.ops, "branchwise", self.ops),
            mock.patch.object(forward, "InvariantLinears", linears),
        ):
            yield

    def __getattr__(self, op: str) -> Callable:
        def call(*args, **options):
            if self.emulated:
                with self.active():
                    return getattr(ops, op)(*args, **options)
            moved = tree_map_only(torch.Tensor, lambda x: x.cuda(), (args, options))
            result = getattr(ops, op)(*moved[0], **moved[1])
            # What the op wrote in place.
            pairs = zip(tree_leaves((args, options)), tree_leaves(moved), strict=True)
            for own, on_device in pairs:
                if isinstance(own, torch.Tensor):
                    own.copy_(on_device)
            return tree_map_only(torch.Tensor, lambda x: x.cpu(), result)

        return call


@pytest.fixture(scope="session", params=["emulated", "cuda"])
def device(request) -> Device:
    if request.param == "cuda" and not ON_DEVICE:
        pytest.skip("needs a CUDA device and libbranchwise_cuda")
    if request.param == "emulated":
        if ON_DEVICE and not EMULATED.exists():
            pytest.skip("built without BRANCHWISE_EMULATE")
        torch.ops.load_library(EMULATED)
    return Device(request.param)


@pytest.fixture
def emulator(request) -> Device:
    torch.ops.load_library(EMULATED)
    return Device("emulated")
