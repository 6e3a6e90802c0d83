"""A model's modules doing something else for a while: layers that let hidden states pass, linear layers by our op.
Works on the modules, not on copies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from . import ops

# (hidden_states [B, T, H], keyword arguments of the layer) -> hidden states instead of the layer's
Replacement = Callable[[Tensor, dict[str, Any]], Tensor]


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The model's stack of decoder layers.

    Raises:
        ValueError: there is none, or not one only.
    """
    count = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    stacks = [stack for stack in stacks if all(hasattr(layer, "self_attn") or _attention(layer) for layer in stack)]
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} must have one stack of {count} decoder layers, found {len(stacks)}")
    return stacks[0]


def _attention(layer: torch.nn.Module) -> bool:
    return any("attention" in type(child).__name__.lower() for child in layer.children())


class LayerSwitch:
    """Decides, layer by layer and forward by forward, whether a decoder layer runs.

    One switch per model at a time; :meth:`remove` restores the model. Not thread-safe, as it changes the model.

    Attributes:
        replace: by layer index, what to do instead of the layer; absent: the layer runs.
        outputs: by layer index, the hidden states [B, T, H] after the layers in ``watch`` in the last forward.
    """

    def __init__(self, model: PreTrainedModel, watch: frozenset[int] = frozenset()) -> None:
        self.layers = decoder_layers(model)
        if any("forward" in layer.__dict__ for layer in self.layers):
            raise ValueError(f"the layers of this {type(model).__name__} are in use by another early exit")
        self.replace: dict[int, Replacement] = {}
        self.outputs: dict[int, Tensor] = {}
        self._watch = watch
        for index, layer in enumerate(self.layers):
            layer.forward = self._switched(index, layer.forward)

    def remove(self) -> None:
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    def _switched(self, index: int, run: Callable[..., Any]) -> Callable[..., Any]:
        in_tuple = False  # some models' layers return (hidden_states, ...)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal in_tuple
            replacement = self.replace.get(index)
            if replacement is not None:
                out = replacement(hidden_states, kwargs)
                result: Any = (out,) if in_tuple else out
            else:
                result = run(hidden_states, *args, **kwargs)
                in_tuple = isinstance(result, tuple)
                out = result[0] if in_tuple else result
            if index in self._watch:
                self.outputs[index] = out
            return result

        return forward


def pass_through(hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return hidden_states


class InvariantLinears:
    """While entered, a model's ``torch.nn.Linear`` modules compute by :func:`branchwise.ops.invariant_linear`. Not
    thread-safe, as it changes the model; not to be entered twice.

    Subclasses (quantized layers, for example), and modules in whose place somebody has put something, stay as they are.

    Args:
        model: whose modules.
        where_faster: leave to torch what it does faster: everything on a GPU, on the CPU fp32 but for
            :func:`faster_rows`.
    """

    def __init__(self, model: PreTrainedModel, where_faster: bool = False) -> None:
        linears = [m for m in model.modules() if type(m) is torch.nn.Linear and "forward" not in m.__dict__]
        form = _where_faster(faster_rows()) if where_faster else _invariant
        ours = [m for m in linears if m.weight.device.type == "cpu" or not where_faster]
        self._forwards = [(m.__dict__, MethodType(form, m)) for m in ours]

    def __enter__(self) -> None:
        for attributes, forward in self._forwards:  # a module's own setattr takes ten times as long
            attributes["forward"] = forward

    def __exit__(self, *args: object) -> None:
        for attributes, _ in self._forwards:
            attributes.pop("forward", None)


class InvariantMeans(TorchDispatchMode):
    """While entered, means over the last dimension, of which norms are made, add in an order that the number of rows
    does not change. torch's do so on the CPU; on a GPU its reductions share out threads by that number, but its layer
    norm, which computes the mean, takes a block per row.

    Args:
        device: whose tensors' means.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.mean.dim and not kwargs and args[0].device.type == self.device:
            x, dim, keepdim = (*args, False)[:3]
            if len(dim) == 1 and dim[0] in (-1, x.dim() - 1) and x.shape[-1] > 0:
                mean = torch.native_layer_norm(x, [x.shape[-1]], None, None, 0.0)[1].to(x.dtype)
                return mean if keepdim else mean.squeeze(-1)
        return func(*args, **kwargs)


def faster_rows() -> range:
    """For how many rows in fp32 ``invariant_linear`` is faster than torch's linear layers on this CPU, by measurements
    (docs/kernels-figures.md). On AMD's torch's are slow, and without AVX2 ours for more than a few."""
    isa, _ = ops.cpu_isa()
    if isa == "baseline":
        return range(0)
    if not _mkl_on_amd():
        return range(4, 25 if isa == "avx2" else 33)
    return range(1, 129 if isa == "avx2" else sys.maxsize)


@cache
def _mkl_on_amd() -> bool:
    cpus = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and cpus.exists() and "AuthenticAMD" in cpus.read_text()


def _where_faster(rows: range) -> Callable[[torch.nn.Linear, Tensor], Tensor]:
    def forward(linear: torch.nn.Linear, x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and x.numel() // x.shape[-1] not in rows:
            return torch.nn.functional.linear(x, linear.weight, linear.bias)
        return _invariant(linear, x)

    return forward


def _invariant(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    own = linear._parameters  # a module's own getattr takes half a microsecond
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or x.dtype is not weight.dtype or x.dtype is torch.float64:  # pruned; autocast
        return torch.nn.functional.linear(x, linear.weight, linear.bias)
    return ops.invariant_linear(x, weight, bias)
