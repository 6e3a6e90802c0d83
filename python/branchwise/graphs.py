"""CUDA graphs: recording work once and launching it again as one, with other values at the same addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")

# Their results have sizes or values that only the device knows, so the host waits for it.
_WAITING = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::equal",
        "aten::masked_select",
        "aten::nonzero",
        "aten::repeat_interleave.Tensor",
        "aten::_unique2",
        "aten::unique_consecutive",
        "aten::unique_dim",
    }
)


class Recording(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records what a function launches; what it returns lies where every replay leaves it."""

    def record(self, run: Callable[[], Result]) -> tuple[Recording, Result]: ...


class CudaGraphs:
    """A :class:`Recorder` of CUDA graphs that share one pool of memory, since one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Result]) -> tuple[Recording, Result]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what a recording forbids.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph, result


def recorder_for(device: torch.device) -> Recorder | None:
    """None where there is nothing like a graph."""
    return CudaGraphs() if device.type == "cuda" else None


class HostReads(TorchDispatchMode):
    """Notes in ``seen`` what a function does, while this is active, that no graph can hold: the host waits for values
    of the device, or hands over values of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removesuffix(".default")
        if name in _WAITING or self._reads(name, args, out):
            self.seen.append(name)
        return out

    def _reads(self, name: str, args: Any, out: Any) -> bool:
        if name == "aten::lift_fresh":  # torch.tensor(...): a number by itself is a kernel's argument
            return args[0].dim() > 0
        if name.startswith(("aten::index.", "aten::index_put")):  # by a mask: as many as there are
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name not in ("aten::_to_copy", "aten::copy_"):
            return False
        devices = {x.device for x in tree_leaves((args, out)) if isinstance(x, Tensor) and x.dim() > 0}
        return len(devices) > 1
