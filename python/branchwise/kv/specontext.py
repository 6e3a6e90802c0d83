"""SpeContext: a small retrieval head picks, before the model runs, what every layer attends to (card specontext)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from .base import check_range, full_layers
from .placement import MemoryModel
from .projections import LayerProjections
from .selecting import SelectingSession


class RetrievalHead(Protocol):
    """Queries and keys from token ids alone."""

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """i64[B, T] tokens and positions: query [B, Hq, T, D] and key [B, Hkv, T, D] after RoPE; Hkv as the
        target's."""
        ...


class LayerHead:
    """A retrieval head without training: the target's embedding, and the projections of one of its early layers.

    Args:
        model: the target; see :class:`branchwise.kv.projections.LayerProjections`.
        layer: whose norm and projections.
    """

    def __init__(self, model: PreTrainedModel, layer: int = 1) -> None:
        self._embed = model.get_input_embeddings()
        self._project = LayerProjections(model, layer)

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self._project(self._project.norm(self._embed(tokens)))
        return self._project.rotate(query, positions), self._project.rotate(key, positions)


class SpeContext:
    """One list of tokens per KV head, for all layers, by the attention of a retrieval head (Xu et al. 2025, arXiv
    2512.00722).

    A head's attention is normalised over the tokens that compete, and the largest value among the query heads of a KV
    head decides. Nothing is evicted; a step reads the head's keys and ``budget`` tokens per layer. Exact while a row
    has at most ``budget`` tokens, and below ``min_length``.

    With ``offload``, layers lie in files and only what a step attends to is in memory, ``budget`` tokens per KV head
    and the new ones (with trees, what any node attends to). Every step fetches what the last one did not have; where
    torch leaves a core free (``torch.set_num_threads``), on a thread that is ahead of the layers. The text is the same,
    bit for bit.

    Args:
        head: a trained :class:`RetrievalHead`; None: a :class:`LayerHead` of the target.
        budget: tokens attended to per KV head, recent ones included.
        sinks, recent, min_length: as for :class:`branchwise.kv.Quest`; the paper forces no recent tokens.
        offload: directory for files that keep layers; None: everything stays in memory. On a disk: what lies in a
            directory that is memory itself saves none.
        memory: bytes for keys and values of a batch. Before every forward, as many layers as this demands move to
            files, last ones first, see :class:`branchwise.kv.MemoryModel`; None: all layers, from the start.

    Raises:
        ValueError: an option outside its range; on use, a model whose layers share keys or, without a head, without the
            modules that one is made of.
    """

    page_size = 1

    def __init__(
        self,
        head: RetrievalHead | None = None,
        budget: int = 2048,
        sinks: int = 4,
        recent: int = 32,
        min_length: int | None = None,
        offload: str | os.PathLike[str] | None = None,
        memory: int | None = None,
    ) -> None:
        check_range("sinks", sinks, 0)
        check_range("recent", recent, 0)
        check_range("budget", budget, recent + 2)
        if memory is not None:
            check_range("memory", memory, 0)
            if offload is None:
                raise ValueError(f"memory = {memory} needs offload, a directory for what does not fit")
        self.head, self.budget, self.sinks, self.recent, self.min_length = head, budget, sinks, recent, min_length
        self.offload, self.memory = offload, memory

    def begin(self, model: PreTrainedModel, store: KVStore) -> SpeContextSession:
        return SpeContextSession(model, store, self)


class SpeContextSession(SelectingSession):
    options: SpeContext

    def __init__(self, model: PreTrainedModel, store: KVStore, options: SpeContext) -> None:
        super().__init__(model, store, options)
        self._head = LayerHead(model) if options.head is None else options.head
        self._keys = KVStore(len(store.seq_lens), store.capacity)  # the head's; their values are not used
        self._query = torch.empty(0)
        self._chosen: tuple[Tensor, Tensor] | None = None  # in this forward
        self._layers = sorted(full_layers(model))  # that may lie in files
        if options.offload is not None:
            self.offload(options.offload, self._layers if options.memory is None else [])

    @property
    def num_bytes(self) -> int:
        """Bytes of the retrieval head's keys, and of what is in memory of layers in files."""
        return self._keys.num_bytes + (0 if self.offloaded is None else self.offloaded.num_bytes)

    def memory_model(self) -> MemoryModel:
        config = self.model.config.get_text_config()
        head = self._keys.layers[0]
        heads, dim, item_bytes = head.keys.shape[1], head.keys.shape[3], head.keys.element_size()
        return MemoryModel(
            layers=config.num_hidden_layers,
            rows=len(self.store.seq_lens),
            kv_heads=heads,
            head_dim=dim,
            item_bytes=item_bytes,
            budget=self.options.budget + 2,  # the token itself, and its successor's place
            head_bytes=heads * (dim + 1) * item_bytes,
        )

    def before(self, tokens: Tensor, positions: Tensor) -> None:
        self._query, key = self._head(tokens, positions)
        self._chosen = None
        self._keys.set_lengths(self.store.seq_lens)
        self._keys.reserve(tokens.shape[1])
        self._keys.update(key, key[..., :1], 0)
        if self.offloaded is not None and self.options.memory is not None:
            count = self.memory_model().offloaded(self.store.capacity, self.options.memory)
            self.offloaded.move(self._layers[-count:] if count else [])

    def select(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        if self._chosen is None:
            self._chosen = self.choose(call, self._scores(call))
            if self.offloaded is not None:
                self.offloaded.prefetch(call, self._chosen, unit=1)
        return self._chosen

    def _scores(self, call: LayerCall) -> Tensor:
        """f32[B, T, Hkv, S]. Each token's softmax is over what competes for it, which depends on its position."""
        keys = self._keys.layers[0].keys
        B, _, T, D = self._query.shape
        scores = torch.full((B, T, *keys.shape[1:3]), -torch.inf)
        lens = self.store.seq_lens
        depths = call.plan.positions - lens[:, None]
        for depth in torch.unique(depths).tolist():
            nodes = torch.nonzero((depths == depth).any(0)).flatten()
            competing = (lens + depth - self.recent_pages).clamp(min=0).minimum(lens).int()
            found = ops.score_pages(
                self._query[:, :, nodes].contiguous(),
                keys,
                competing,
                per_token=True,
                normalize=True,
                scale=D**-0.5,
            )
            here = (depths[:, nodes] == depth)[..., None, None]
            scores[:, nodes] = torch.where(here, found, scores[:, nodes])
        return scores

    def committed(self, nodes: Tensor, count: Tensor) -> None:
        self._keys.commit(nodes, count)

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self._keys.select_rows(list(rows))
