"""Where the CUDA ops run: on a device, and everywhere in the emulator, which executes the same sources on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from branchwise import ops
from branchwise.ops._load import LIBRARY_DIR

EMULATED = LIBRARY_DIR / "libbranchwise_emulated.so"
ON_DEVICE = ops.CUDA_LOADED and torch.cuda.is_available()


class Device:
    """Calls a CUDA op with CPU tensors and hands back CPU tensors."""

    def __init__(self, name: str):
        self.emulated = name == "emulated"
        self.ops = torch.ops.branchwise_emulated if self.emulated else torch.ops.branchwise

    def move(self, value):
        if isinstance(value, list):
            return [self.move(x) for x in value]
        return value if self.emulated or not isinstance(value, torch.Tensor) else value.cuda()

    def __getattr__(self, op: str) -> Callable:
        def call(*args, **options):
            moved = [self.move(x) for x in args], {k: self.move(v) for k, v in options.items()}
            result = getattr(self.ops, op)(*moved[0], **moved[1])
            return result.cpu() if isinstance(result, torch.Tensor) else tuple(x.cpu() for x in result)

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
