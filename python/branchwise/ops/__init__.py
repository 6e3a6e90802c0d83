"""Torch ops of branchwise: the only place that names ``torch.ops.branchwise``.

One module per family holds, side by side, the typed wrapper, the fake kernel and the slow exact
reference that the tests use as oracle.
"""

from ._load import CUDA_LOADED, ISA_LEVELS, LIBRARY_DIR, cpu_isa, set_cpu_isa
from .attention import merge_attention, tree_attention
from .draft import top_tokens
from .kv import append_kv, commit_kv
from .tree import build_tree
from .verify import (
    node_uniforms,
    verify_block,
    verify_chain,
    verify_greedy,
    verify_multi_draft,
    verify_policy,
    verify_sample,
    verify_traversal,
    verify_typical,
)

__all__ = [
    "CUDA_LOADED",
    "ISA_LEVELS",
    "LIBRARY_DIR",
    "append_kv",
    "build_tree",
    "commit_kv",
    "cpu_isa",
    "merge_attention",
    "node_uniforms",
    "set_cpu_isa",
    "top_tokens",
    "tree_attention",
    "verify_block",
    "verify_chain",
    "verify_greedy",
    "verify_multi_draft",
    "verify_policy",
    "verify_sample",
    "verify_traversal",
    "verify_typical",
]
