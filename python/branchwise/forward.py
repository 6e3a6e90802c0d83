"""A model and the KV store of its batch: ragged prompts, trees, and nothing that plain forwards do not need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import AttentionPlan, LayerPolicy
from .cache import CACHE_NAME, KVStore
from .devices import to_device
from .fused import FusedLayers
from .layers import InvariantLinears, InvariantMeans
from .tree import TokenTree

_CHUNK = 2048  # prompt tokens per forward: bounds activations and workspace


class StoredModel:
    """Forwards of a model over a :class:`KVStore`; the caller is inside :func:`branchwise.attention.use_attention`.

    Args:
        model: a supported model.
        store: of its batch.
        kv: decides what layers attend to and keep; None: everything.
        keep_hidden: leave the hidden states of every forward, after the final norm, in ``hidden_states``.
        deterministic: what a token gets depends on its text alone, bit for bit: not on the tree that it is in, nor on
            the batch (:func:`branchwise.ops.path_attention`, :func:`branchwise.ops.invariant_linear`). Without a
            policy.

    Attributes:
        forwards: how many were made.
        hidden_states: [B, T, H] of the last forward, or of the last tokens of :meth:`extend`; None if not kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: KVStore,
        keep_hidden: bool = False,
        kv: LayerPolicy | None = None,
        deterministic: bool = False,
    ) -> None:
        self.model, self.store, self.kv = model, store, kv
        self.deterministic = deterministic
        self.forwards = 0
        self.hidden_states: Tensor | None = None
        self.keep_hidden = keep_hidden
        self._linears = InvariantLinears(model, where_faster=not deterministic)
        self._fused = FusedLayers(model)
        self._means = InvariantMeans() if deterministic and model.device.type == "cuda" else nullcontext()

    def extend(self, rows: Sequence[Tensor], after_chunk: Callable[[Tensor], None] | None = None) -> Tensor:
        """Appends text, ragged, and commits it.

        Args:
            rows: i64[n_b] new tokens per row, some of them at least one.
            after_chunk: called after every forward with i32[B], how many tokens of it were each row's own.

        Returns:
            Logits [B, 1, V] after the last new token of each row; of a row without any, undefined.
        """
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        longest = int(lengths.max())
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        logits: Tensor | None = None
        hidden: Tensor | None = None
        for begin in range(0, longest, _CHUNK):
            chunk = tokens[:, begin : begin + _CHUNK]
            # A row that ended in an earlier chunk writes behind its end, where the next append overwrites it.
            ends = (lengths - begin).clamp(0, chunk.shape[1])
            here = torch.nonzero((ends > 0) & (lengths <= begin + chunk.shape[1])).flatten()
            wanted = sorted(set((ends[here] - 1).tolist())) or [0]
            positions = self.store.seq_lens[:, None] + torch.arange(chunk.shape[1])
            last = begin + chunk.shape[1] == longest
            out = self.forward(chunk, positions, wanted=wanted, prompt_ends=ends, last_chunk=last)
            logits = out.new_empty(len(rows), 1, out.shape[-1]) if logits is None else logits
            at = [wanted.index(int(end) - 1) for end in ends[here]]
            logits[here, 0] = out[here, at]
            if self.hidden_states is not None:
                hidden = self.hidden_states[:, :1].clone() if hidden is None else hidden
                hidden[here, 0] = self.hidden_states[here, (ends[here] - 1).long()]
            if after_chunk is not None:
                after_chunk(ends)
            self.store.advance(ends)
        assert logits is not None
        self.hidden_states = hidden
        return logits

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        tree_mask: Tensor | None = None,
        *,
        wanted: Sequence[int] | None = None,
        pending: int = 0,
        tree: TokenTree | None = None,
        prompt_ends: Tensor | None = None,
        last_chunk: bool = False,
        layers: Sequence[int] | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """One forward; the new keys and values are in the store, uncommitted.

        Args:
            tokens, positions: i64[B, T].
            tree_mask: i64[B, pending + T, W] ancestor bits; None: causal.
            wanted: which of the T logits; None: all.
            pending: uncommitted nodes that forwards before this one left in the store, to which these are added.
            tree: what is being verified, for layers that know parts of it already.
            prompt_ends: i32[B], of a prompt's chunk: how many of the T tokens are each row's own.
            last_chunk: no row's prompt has more.
            layers: those that run, if some are switched off and the others hold pages; None: all.
            embeddings: [B, T, H], read in place of those of the tokens.

        Returns:
            Logits [B, T or len(wanted), V].

        Raises:
            ValueError: the model never called the attention function.
        """
        self.store.reserve(tokens.shape[1], pending, layers)
        device = self.model.device
        tokens, positions, tree_mask = tokens.to(device), positions.to(device), to_device(tree_mask, device)
        lens = self.store.lens_mirror(self.store.seq_lens, device)
        plan = AttentionPlan(
            lens, tree_mask, positions, tree, prompt_ends, last_chunk, self.deterministic, self.kv, self.store
        )
        if self.kv is not None:
            self.kv.before(tokens, positions)
        options: dict[str, Any] = {}
        if wanted is not None and self.model._supports_logits_to_keep():
            options["logits_to_keep"] = torch.tensor(wanted)
        hook = self.model.base_model.register_forward_hook(self._note_hidden) if self.keep_hidden else None
        try:
            with self._linears, self._fused, self._means:
                logits = self.model(
                    input_ids=tokens if embeddings is None else None,
                    inputs_embeds=embeddings,
                    position_ids=positions,
                    use_cache=True,
                    branchwise_plan=plan,
                    **{CACHE_NAME: self.store},
                    **options,
                ).logits
        finally:
            if hook is not None:
                hook.remove()
        if plan.calls == 0:
            raise ValueError(
                f"{type(self.model).__name__} never called the registered attention function; it is not supported"
            )
        self.forwards += 1
        return logits if wanted is None or options else logits[:, list(wanted)]

    def _note_hidden(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.hidden_states = output[0]
