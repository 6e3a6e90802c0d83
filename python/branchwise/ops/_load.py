"""Loads the op libraries into torch, once, on first import of ``branchwise.ops``."""

import os
from pathlib import Path

import torch

from .. import _host

LIBRARY_DIR = Path(_host.__file__).parent
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
OLDEST_TORCH = (2, 11)


def _load() -> bool:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise ImportError(f"branchwise needs torch>=2.11, found {torch.__version__}: pip install -U torch")
    torch.ops.load_library(os.fspath(LIBRARY_DIR / "libbranchwise_cpu.so"))
    cuda = LIBRARY_DIR / "libbranchwise_cuda.so"
    if torch.version.cuda is None or not cuda.exists():
        return False
    torch.ops.load_library(os.fspath(cuda))
    return True


CUDA_LOADED = _load()


def cpu_isa() -> tuple[str, str]:
    """The CPU instruction set in use, and the best one of this machine.

    Chosen on first use; the environment variable ``BRANCHWISE_CPU_ISA`` (baseline, avx2, avx512,
    avx512_bf16, amx_bf16) lowers it. The last is for attention over bf16 and :func:`invariant_linear`.
    """
    chosen, best = torch.ops.branchwise.cpu_isa(-1)
    return ISA_LEVELS[chosen], ISA_LEVELS[best]


def set_cpu_isa(level: str) -> None:
    """Use another instruction set from now on, in the whole process.

    Raises:
        ValueError: ``level`` is not one of baseline, avx2, avx512, avx512_bf16, amx_bf16.
        RuntimeError: this machine lacks it.
    """
    if level not in ISA_LEVELS:
        raise ValueError(f"level must be one of {', '.join(ISA_LEVELS)}, got {level!r}")
    torch.ops.branchwise.cpu_isa(ISA_LEVELS.index(level))


def refuse_grad(op: str, *tensors: torch.Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for t in tensors:  # any() over a generator would take 0.2 us of a call of 7
        if t is not None and t.requires_grad:
            raise RuntimeError(f"{op} is for inference and has no gradient: call it under torch.no_grad()")
