"""Self-speculation: the target's own first layers draft, and its other layers verify (card early-exit, D)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..attention import pack_mask
from ..forward import StoredModel
from ..layers import LayerSwitch, pass_through
from ..tree import DrawKind, RowTree
from .base import DraftRequest, Needs, Verified
from .beg_mab import BegMab
from .growth import grow_best_first, grow_shape
from .ranks import RankChances


class EarlyExit:
    """Trees from the target's first ``exit_layer`` layers, with its final norm and head on top (LayerSkip, Elhoushi et
    al. 2024, arXiv 2404.16710), or from one of several such sub-models, as SoFT trains them (Kavehzadeh et al. 2023,
    arXiv 2309.08968).

    The keys, values and hidden states that drafting computed serve the verification: it runs the other layers only,
    so no layer sees a node twice. Without training for early exits, expect few accepted tokens. Greedy or by
    sample-and-match. One ``generate`` call per model at a time, as it switches the model's layers.

    Args:
        exit_layer: layers that draft, E; the target has more. Several: in every round those that have gained the most
            tokens per second so far (:class:`branchwise.drafters.beg_mab.BegMab`), others in one round of ten.
        width, depth, growth, min_score: as for :class:`branchwise.drafters.Model`.

    Raises:
        ValueError: an option outside its range; on use, a target with no more than E layers, whose layers cannot be
            found, or share keys and values among each other.
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.NOTHING

    def __init__(
        self,
        exit_layer: int | Sequence[int],
        width: int = 1,
        depth: int = 6,
        growth: Literal["best_first", "static"] = "best_first",
        min_score: float = 0.1,
    ) -> None:
        exits = [exit_layer] if isinstance(exit_layer, int) else sorted(set(exit_layer))
        if not exits or exits[0] < 1 or width < 1 or depth < 1:
            raise ValueError(f"exit_layer, width and depth must be at least 1, got {exit_layer}, {width} and {depth}")
        if growth not in ("best_first", "static"):
            raise ValueError(f"growth must be 'best_first' or 'static', got {growth!r}")
        self.exits, self.width, self.depth, self.min_score = exits, width, depth, min_score
        self.growth = growth
        self.ranks = {layer: RankChances(width) for layer in exits}
        self.choice = BegMab([exits], [1])

    def begin(self, request: DraftRequest) -> EarlyExitSession:
        if request.target is None or request.store is None:
            raise ValueError(
                "early exit drafts with the target and its store, inside a decoder, without a KV policy, and not in "
                "e4m3; this request comes without them"
            )
        config = request.target.config.get_text_config()
        count = config.num_hidden_layers
        if getattr(config, "num_kv_shared_layers", 0):
            raise ValueError(
                f"{type(request.target).__name__} has layers that read the keys of earlier ones within a forward, "
                "so its first layers cannot run ahead of the others"
            )
        if self.exits[-1] >= count:
            raise ValueError(f"exit_layer must be below the target's {count} layers, got {self.exits[-1]}")
        return EarlyExitSession(self, request)


class EarlyExitSession:
    """Implements :class:`branchwise.drafters.growth.Expander` with part of the target; slot 0 is the root's."""

    def __init__(self, options: EarlyExit, request: DraftRequest) -> None:
        assert request.target is not None and request.store is not None
        self._options = options
        self._eos = torch.tensor(sorted(request.eos), dtype=torch.int64)
        self._last = torch.tensor([[int(prompt[-1])] for prompt in request.prompts])
        self._target = StoredModel(request.target, request.store, deterministic=request.deterministic)
        self._hidden: list[Tensor] = []  # after layer E, of this round's nodes by slot
        self._exit = options.exits[0]  # of this round
        self._begun = 0.0  # when it began to draft; 0: it did not
        self._switch = LayerSwitch(request.target, watch=frozenset(layer - 1 for layer in options.exits))
        self._count = len(self._switch.layers)

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        roots = self._last.flatten().tolist()
        self._begun = 0.0
        if max(budgets) < 2:
            return [RowTree.root(root) for root in roots]
        options = self._options
        self._hidden = []
        self._begun, self._exit = time.perf_counter(), options.choice.select(len(roots))
        self._switch.replace = dict.fromkeys(range(self._exit, self._count), pass_through)
        if options.growth == "static":
            shape = options.ranks[self._exit].shape(max(budgets), options.depth)
            trees = grow_shape(self, roots, budgets, self._eos, shape)
        else:
            trees = grow_best_first(
                self,
                roots,
                budgets,
                self._eos,
                width=options.width,
                depth=options.depth,
                min_score=options.min_score,
            )
        self._run_leaves(trees)
        # The verification's forward, which comes next, begins behind layer E.
        self._switch.replace = dict.fromkeys(range(self._exit - 1), pass_through)
        self._switch.replace[self._exit - 1] = self._hand_over
        return trees

    def root(self) -> Tensor:
        return self._forward(self._last, torch.zeros_like(self._last), torch.ones(len(self._last), 1, 1).bool())[:, 0]

    def expand(self, tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        # The root is a node like others here: everyone's ancestor.
        with_root = torch.nn.functional.pad(ancestors, (1, 0, 1, 0))
        with_root[:, :, 0] = True
        return self._forward(tokens, depths, with_root)

    def _forward(self, tokens: Tensor, depths: Tensor, ancestors: Tensor, wanted: list[int] | None = None) -> Tensor:
        k = tokens.shape[1]
        positions = self._target.store.seq_lens[:, None] + depths
        self._ancestors = ancestors
        logits = self._target.forward(
            tokens, positions, pack_mask(ancestors), pending=ancestors.shape[1] - k, wanted=wanted
        )
        self._hidden.append(self._switch.outputs[self._exit - 1][:, :k])
        return logits

    def _run_leaves(self, trees: Sequence[RowTree]) -> None:
        """Nodes of the trees that growth did not expand, ragged; afterwards ``ids`` are slots, the root's is 0."""
        leaves = []
        for tree in trees:
            assert tree.ids is not None
            tree.ids += 1
            leaves.append(np.flatnonzero(tree.ids == 0)[1:])
        B, N, k = len(trees), self._ancestors.shape[1], max(map(len, leaves))
        if k == 0:
            return
        tokens, depths = self._last.expand(-1, k).clone(), torch.zeros(B, k, dtype=torch.int64)
        ancestors = torch.eye(N + k, dtype=torch.bool).repeat(B, 1, 1)
        ancestors[:, :N, :N] = self._ancestors
        for b, (tree, nodes) in enumerate(zip(trees, leaves, strict=True)):
            assert tree.ids is not None
            for i, node in enumerate(nodes):
                parent = int(tree.ids[tree.parents[node]])
                ancestors[b, N + i, :N] = self._ancestors[b, parent]
                tokens[b, i], depths[b, i] = int(tree.tokens[node]), len(tree.path(int(node)))
            tree.ids[nodes] = N + np.arange(len(nodes))
        self._forward(tokens, depths, ancestors, wanted=[0])

    def _hand_over(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """In place of layer E in the verification: hidden states of the nodes, their keys and values put in order."""
        self._switch.replace = {}
        tree = kwargs["branchwise_plan"].tree
        B, T = hidden_states.shape[:2]
        slots = torch.zeros(B, T, dtype=torch.int64)
        for b, row in enumerate(tree.rows):
            slots[b, : len(row)] = torch.from_numpy(row.ids.astype(np.int64))
        store, rows = self._target.store, torch.arange(B)[:, None]
        if not torch.equal(slots, torch.arange(T).expand(B, -1)):
            at = store.seq_lens[:, None] + slots
            for layer in store.layers[: self._exit]:
                if layer.is_initialized:  # layers that share another's hold none
                    key, value = (x[rows, :, at].transpose(1, 2) for x in (layer.keys, layer.values))
                    ops.append_kv(key, value, layer.keys, layer.values, store.seq_lens)
        return torch.cat(self._hidden, 1)[rows, slots]

    def observe(self, verified: Verified) -> None:
        for b, tokens in enumerate(verified.emitted):
            if tokens:
                self._last[b, 0] = tokens[-1]
        if not self._begun:
            return
        emitted = sum(map(len, verified.emitted))
        self._options.choice.record(len(self._last), self._exit, emitted, time.perf_counter() - self._begun)
        if verified.tree is not None:
            self._options.ranks[self._exit].observe(verified.tree.rows, verified.paths)

    def keep(self, rows: Sequence[int]) -> None:
        self._last = self._last[list(rows)]

    def close(self) -> None:
        self._switch.remove()
