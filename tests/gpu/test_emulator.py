"""The emulator notices what it is there to notice: planted mistakes, one by one."""

import pytest


@pytest.mark.parametrize("kind", range(4))
def test_right_kernels_pass(kind, emulator):
    assert emulator.ops.run_fault(kind, False) == 0


@pytest.mark.parametrize("kind", [0, 1], ids=["missing barrier", "copy not waited for"])
def test_wrong_values(kind, emulator):
    assert emulator.ops.run_fault(kind, True) > 0


@pytest.mark.parametrize(("kind", "text"), [(2, "wait at different places"), (3, "never reach")])
def test_threads_that_part(kind, text, emulator):
    with pytest.raises(RuntimeError, match=text):
        emulator.ops.run_fault(kind, True)
    assert emulator.ops.run_fault(kind, False) == 0  # and runs on
