"""A stand-in for CUDA graphs on the CPU: a function's torch ops are recorded once and run again on the same tensors.

What a graph would not do again is not done again here either: Python, and what it decided.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from branchwise.graphs import HostReads


class RecordedGraphs:
    """Implements :class:`branchwise.graphs.Recorder`."""

    def __init__(self):
        self.replays = 0

    def record(self, run):
        recording = _Recording(self)
        with recording, HostReads() as reads:
            result = run()
        recording.undo()
        if reads.seen:
            raise RuntimeError(f"operation not permitted when stream is capturing: {reads.seen}")
        return recording, result


class _Recording(TorchDispatchMode):
    def __init__(self, owner):
        super().__init__()
        self.owner, self.calls = owner, []
        self.own = set()  # storages that the function made
        self.before = []  # what it wrote elsewhere: capturing a graph has no effect

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arguments = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        written = _tensors([value for name, value in arguments.items() if name in writes])
        self.before += [(x, x.clone()) for x in written if _storage(x) not in self.own]
        out = func(*args, **(kwargs or {}))
        given = set(map(_storage, _tensors(arguments)))
        made = [(i, x) for i, x in enumerate(_tensors(out)) if _storage(x) not in given]
        if written or made:  # all else are views
            self.calls.append((func, args, kwargs or {}, made))
        self.own.update(_storage(x) for _, x in made)
        return out

    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before.clear()

    def replay(self):
        self.owner.replays += 1
        for func, args, kwargs, made in self.calls:
            results = _tensors(func(*args, **kwargs))
            for i, old in made:
                old.copy_(results[i])


def _tensors(x):
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def _storage(x):
    return x.untyped_storage()._cdata
