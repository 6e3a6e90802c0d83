import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would take the other worker's core

import pytest
import torch

from branchwise import ops

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores, and tiny models gain nothing from threads

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
