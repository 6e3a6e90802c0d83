"""KV policies: what is attended to and what is kept, one file each."""

from .active import policy_of, set_policy
from .adakv import AdaKV
from .base import KVPolicy, KVSession
from .delta import DELTA, place_planners
from .gates import estimate_gates
from .gemfilter import GemFilter
from .h2o import H2O
from .headwise import HeadwiseKV
from .placement import MemoryModel
from .press import FromPress
from .prompt_distill import PromptDistill
from .pyramidkv import PyramidKV
from .quest import Quest
from .sentencekv import SentenceKV, sentence_marks
from .snapkv import SnapKV
from .speckv import SpecKV
from .specontext import LayerHead, RetrievalHead, SpeContext
from .specpc import SpecPC
from .streaming_llm import StreamingLLM
from .tova import TOVA

__all__ = [
    "DELTA",
    "H2O",
    "TOVA",
    "AdaKV",
    "FromPress",
    "GemFilter",
    "HeadwiseKV",
    "KVPolicy",
    "KVSession",
    "LayerHead",
    "MemoryModel",
    "PromptDistill",
    "PyramidKV",
    "Quest",
    "RetrievalHead",
    "SentenceKV",
    "SnapKV",
    "SpeContext",
    "SpecKV",
    "SpecPC",
    "StreamingLLM",
    "estimate_gates",
    "place_planners",
    "policy_of",
    "sentence_marks",
    "set_policy",
]
