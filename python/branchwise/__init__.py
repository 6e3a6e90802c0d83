"""branchwise: lossless tree speculation and tree attention for Hugging Face language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .cache import KVStore as KVStore
    from .decoding import AnswerFound as AnswerFound
    from .decoding import AStar as AStar
    from .decoding import Auto as Auto
    from .decoding import BestOfMajority as BestOfMajority
    from .decoding import BestOfN as BestOfN
    from .decoding import BigLittle as BigLittle
    from .decoding import DecodeStats as DecodeStats
    from .decoding import EarlyExitLossy as EarlyExitLossy
    from .decoding import EarlyRejection as EarlyRejection
    from .decoding import JudgeScore as JudgeScore
    from .decoding import LogProbabilityScore as LogProbabilityScore
    from .decoding import MicroSteps as MicroSteps
    from .decoding import Monitor as Monitor
    from .decoding import ParticleFilter as ParticleFilter
    from .decoding import PositionKeyedSampler as PositionKeyedSampler
    from .decoding import ReverseSpeculative as ReverseSpeculative
    from .decoding import ShortMAtK as ShortMAtK
    from .decoding import StepEnd as StepEnd
    from .decoding import StepSpeculative as StepSpeculative
    from .decoding import TreeSpeculation as TreeSpeculation
    from .decoding import TreeSpeculationOutput as TreeSpeculationOutput
    from .generate import generate as generate
    from .kv_scales import measure_kv_scales as measure_kv_scales
    from .kv_tree import KVTree as KVTree
    from .patching import patch as patch
    from .patching import sparse_kv as sparse_kv
    from .patching import unpatch as unpatch
    from .tree import DrawKind as DrawKind
    from .tree import RowTree as RowTree
    from .tree import TokenTree as TokenTree

# Loaded on first use: `import branchwise` alone stays cheap and loads neither torch nor transformers.
_HOME = {
    "KVStore": "cache",
    "Auto": "decoding",
    "BigLittle": "decoding",
    "DecodeStats": "decoding",
    "EarlyExitLossy": "decoding",
    "PositionKeyedSampler": "decoding",
    "ReverseSpeculative": "decoding",
    "TreeSpeculation": "decoding",
    "TreeSpeculationOutput": "decoding",
    "AStar": "decoding",
    "BestOfMajority": "decoding",
    "BestOfN": "decoding",
    "EarlyRejection": "decoding",
    "Monitor": "decoding",
    "ParticleFilter": "decoding",
    "ShortMAtK": "decoding",
    "StepEnd": "decoding",
    "AnswerFound": "decoding",
    "JudgeScore": "decoding",
    "LogProbabilityScore": "decoding",
    "StepSpeculative": "decoding",
    "MicroSteps": "decoding",
    "generate": "generate",
    "measure_kv_scales": "kv_scales",
    "KVTree": "kv_tree",
    "patch": "patching",
    "sparse_kv": "patching",
    "unpatch": "patching",
    "DrawKind": "tree",
    "RowTree": "tree",
    "TokenTree": "tree",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in (
        "ops",
        "drafters",
        "acceptance",
        "attention",
        "cache",
        "decoding",
        "diffusion",
        "kv",
        "noise",
        "target",
        "tree",
    ):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'branchwise' has no attribute {name!r}")
