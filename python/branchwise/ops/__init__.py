"""Torch ops of branchwise: the only place that names ``torch.ops.branchwise``.

One module per family holds, side by side, the typed wrapper, the fake kernel and the slow exact
reference that the tests use as oracle.

On CUDA tensors, values of lengths, pages, lists and trees are not checked, as that would wait for the device: what
points outside a tensor is left out instead (docs/cuda.md, which also lists the ops that have a CUDA kernel).
"""

from ._load import CUDA_LOADED, ISA_LEVELS, LIBRARY_DIR, cpu_isa, set_cpu_isa
from .attention import cascade_attention, merge_attention, path_attention, tree_attention
from .diffusion import confidence, draft_blocks, verify_blocks
from .draft import top_tokens
from .fetch import fetch_slots
from .kv import append_kv, commit_kv, evict_kv, rerotate_keys
from .layer import apply_rope, rms_norm
from .linear import invariant_linear
from .scores import attention_mass, page_summaries, score_pages
from .select import select_pages, select_slots
from .sparse import sparse_attention
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
    "apply_rope",
    "attention_mass",
    "build_tree",
    "cascade_attention",
    "commit_kv",
    "confidence",
    "cpu_isa",
    "draft_blocks",
    "evict_kv",
    "fetch_slots",
    "invariant_linear",
    "merge_attention",
    "node_uniforms",
    "page_summaries",
    "path_attention",
    "rerotate_keys",
    "rms_norm",
    "score_pages",
    "select_pages",
    "select_slots",
    "set_cpu_isa",
    "sparse_attention",
    "top_tokens",
    "tree_attention",
    "verify_block",
    "verify_blocks",
    "verify_chain",
    "verify_greedy",
    "verify_multi_draft",
    "verify_policy",
    "verify_sample",
    "verify_traversal",
    "verify_typical",
]
