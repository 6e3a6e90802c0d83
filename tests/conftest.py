import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub

import pytest
import torch

from branchwise import ops

LEVELS = ops.ISA_LEVELS[: ops.ISA_LEVELS.index(ops.cpu_isa()[1]) + 1]


@pytest.fixture(params=LEVELS)
def isa(request):
    """Runs the test on every instruction set that this machine has."""
    before = ops.cpu_isa()[0]
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)


@pytest.fixture
def threads():
    """Sets the thread count for a test and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
