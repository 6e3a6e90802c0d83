"""A model's norms and rotary embeddings by one op each, where its own code takes eight of torch's and sixteen: next to
linear layers that read memory at its rate, each of them costs as much as a small matrix."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import ops

ROTARY = "apply_rotary_pos_emb"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
#: offset and weight_first of ops.rms_norm: as in Llama, OLMo 2, Gemma.
_FORMS = ((0.0, False), (0.0, True), (1.0, True))
_norm_forms: dict[tuple[Any, ...], tuple[float, bool] | None] = {}
_rotary_known: dict[tuple[Any, torch.dtype], bool] = {}


class FusedLayers:
    """While entered, norms compute by :func:`branchwise.ops.rms_norm` and rotary embeddings by
    :func:`branchwise.ops.apply_rope`.

    What is taken over is found by trying: a class of norms, with the same settings, whose results for random rows and
    weights are those of the op, and a modeling file's ``apply_rotary_pos_emb`` whose results have the op's bits.
    Everything else stays as it is, and so do modules in whose place somebody has put something. The function is
    replaced in the modeling file, for all models of the architecture; tensors that are none of the op's go to the
    original. Not to be entered twice.

    Args:
        model: whose modules, on the CPU or a GPU.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        with torch.no_grad():
            modules = list(model.modules())
            norms = [(m.__dict__, _fused_norm(m)) for m in modules if "forward" not in m.__dict__]
            files = {type(m).__module__ for m in modules}
            self._files = sorted(name for name in files if _can_rotate(name, model.dtype))
        self._norms = [(attributes, forward) for attributes, forward in norms if forward is not None]

    def __enter__(self) -> None:
        for attributes, forward in self._norms:  # a module's own setattr takes ten times as long
            attributes["forward"] = forward
        for name in self._files:
            _replaced.enter(name)

    def __exit__(self, *args: object) -> None:
        for attributes, _ in self._norms:
            attributes.pop("forward", None)
        for name in self._files:
            _replaced.leave(name)


def _fused_norm(module: torch.nn.Module) -> Callable[[Tensor], Tensor] | None:
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float):
        return None
    if weight.dim() != 1 or weight.dtype not in _TYPES:
        return None
    if weight.device.type != "cpu" and not (weight.device.type == "cuda" and ops.CUDA_LOADED):
        return None
    settings = sorted(
        (name, value) for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))
    )
    key = type(module), weight.dtype, tuple(settings)
    if key not in _norm_forms:
        _norm_forms[key] = _find_form(module, weight, eps)
    form = _norm_forms[key]
    if form is None:
        return None
    offset, weight_first = form

    own = module._parameters  # a module's own getattr takes half a microsecond

    def forward(x: Tensor) -> Tensor:
        weight = own.get("weight")
        if weight is None or x.dtype is not weight.dtype or torch.is_grad_enabled():
            return type(module).forward(module, x)
        return ops.rms_norm(x, weight, eps, offset, weight_first)

    return forward


def _find_form(module: torch.nn.Module, weight: Tensor, eps: float) -> tuple[float, bool] | None:
    """That of the op with which it computes what the module does; None: with none."""
    g = torch.Generator().manual_seed(0)
    x, random_weight = (torch.randn(*shape, generator=g).to(weight) for shape in ((64, len(weight)), (len(weight),)))
    probe = copy.copy(module)
    probe.__dict__ = {**module.__dict__, "_parameters": {"weight": torch.nn.Parameter(random_weight, False)}}
    try:
        expected = type(module).forward(probe, x)
    except TypeError:  # wants more than x
        return None
    if expected.shape != x.shape or expected.dtype is not x.dtype:
        return None
    for offset, weight_first in _FORMS:
        ours = ops.rms_norm(x, random_weight, eps, offset, weight_first)
        # Means are summed in another order, which few roundings show in 16 bits.
        few_differ = x.dtype is torch.float32 or (ours != expected).float().mean().item() < 0.01
        if few_differ and torch.allclose(ours, expected, rtol=8 * torch.finfo(x.dtype).eps, atol=1e-6):
            return offset, weight_first
    return None


def _can_rotate(file: str, dtype: torch.dtype) -> bool:
    """Whether a modeling file's function computes what the op does."""
    function = _replaced.original(file)
    if function is None or dtype not in _TYPES:
        return False
    if (function, dtype) not in _rotary_known:
        g = torch.Generator().manual_seed(0)
        shapes = ((2, 3, 5, 16), (2, 1, 5, 16), (2, 5, 16), (2, 5, 16))
        inputs = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
        try:
            same = [torch.equal(*pair) for pair in zip(function(*inputs), ops.apply_rope(*inputs), strict=True)]
        except Exception:  # another signature, other shapes
            same = [False]
        _rotary_known[function, dtype] = all(same)
    return _rotary_known[function, dtype]


class _Replaced:
    """Functions of modeling files, replaced as long as anybody wants it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: dict[str, tuple[int, Callable[..., Any]]] = {}  # how often, and the original

    def original(self, file: str) -> Callable[..., Any] | None:
        with self._lock:
            return self._wanted[file][1] if file in self._wanted else getattr(sys.modules.get(file), ROTARY, None)

    def enter(self, file: str) -> None:
        with self._lock:
            count, original = self._wanted.get(file, (0, None))
            if original is None:
                original = getattr(sys.modules[file], ROTARY)
                setattr(sys.modules[file], ROTARY, _fused_rotary(original))
            self._wanted[file] = count + 1, original

    def leave(self, file: str) -> None:
        with self._lock:
            count, original = self._wanted.pop(file)
            if count > 1:
                self._wanted[file] = count - 1, original
            else:
                setattr(sys.modules[file], ROTARY, original)


_replaced = _Replaced()


def _takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the op is for such tensors; other threads' models may call the function with others."""
    if q.device.type != "cpu" and not (q.device.type == "cuda" and ops.CUDA_LOADED):
        return False
    if not (q.dtype is k.dtype is cos.dtype is sin.dtype) or q.dtype not in _TYPES or q.dim() != 4 or cos.dim() != 3:
        return False
    fits = cos.shape[0] in (1, q.shape[0]) and cos.shape[1:] == q.shape[2:]
    return fits and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1


def _fused_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or torch.is_grad_enabled() or not _takes(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return ops.apply_rope(q, k, cos, sin)

    return rotary
