"""Rounds of tree speculation in CUDA graphs: one launch from the trees to the verdict, and one wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..acceptance import Accepted, Rule
from ..cache import KVScales
from ..devices import wait_for
from ..forward import StoredModel
from ..graphs import HostReads, Recorder, Recording
from ..layers import decoder_layers
from ..noise import Noise
from ..static_store import StaticStore
from ..target import refuse_broken
from ..tree import Links, TokenTree

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # nodes per row; beyond, multiples of the last


def padded_size(nodes: int, most: int) -> int:
    """The number of nodes, ``most`` at most, whose graph serves trees of so many."""
    step = _SIZES[-1]
    return min(next((size for size in _SIZES if size >= nodes), -(-nodes // step) * step), most)


def padded_rows(rows: int) -> int:
    """The batch size that a batch with so many running rows shrinks to: a power of two."""
    return 1 << (rows - 1).bit_length()


def graphs_fit(model: PreTrainedModel) -> bool:
    """Nobody has put something of his own in the place of the model's layers, which a graph would hold for good."""
    return not any("forward" in layer.__dict__ for layer in decoder_layers(model))


class RoundKey(NamedTuple):
    """What a graph is for. Everything else is read from tensors."""

    rows: int
    nodes: int
    rule: Rule | None  # None: the forward alone, the verdict is the host's business
    temperature: float
    keep_logits: bool
    keep_hidden: bool
    deterministic: bool


def _addresses(model: PreTrainedModel) -> list[tuple[int, torch.dtype]]:
    return [(tensor.data_ptr(), tensor.dtype) for part in (model.parameters(), model.buffers()) for tensor in part]


@dataclass
class Outcome:
    """What a round computed; tensors on the device are overwritten by the next round."""

    accepted: Accepted | None  # None: still to be decided, from the logits
    logits: Tensor | None


@dataclass
class _Round:
    logits: Tensor | None
    hidden: Tensor | None
    recording: Recording | None = None


class _Exchange:
    """What host and device hand each other in rounds of one shape: views of two buffers, one copy each way."""

    def __init__(self, host: Tensor, device: Tensor, rows: int, nodes: int) -> None:
        integer, long = torch.int32, torch.int64
        flat, table = (rows,), (rows, nodes)
        # 8-byte numbers first, so that all are aligned.
        up = ((long, table), (long, flat), (long, flat), (integer, table), (integer, flat), (integer, flat))
        down = ((long, flat), (integer, table), (integer, flat))
        views, ends = [], []
        for buffer in (host, device):
            begin = 0
            for part in (up, down):
                end = begin
                for dtype, shape in part:
                    size = math.prod(shape) * dtype.itemsize
                    views.append(buffer[end : end + size].view(dtype).view(shape))
                    end += size
                ends.append((begin, end))
                begin = -(-end // 8) * 8
        self.trees, self.verdict, self.trees_there, self.verdict_there = (
            views[:6],
            views[6:9],
            views[9:15],
            views[15:],
        )
        (a, b), (c, d) = ends[:2]
        self._up, self._down = (device[a:b], host[a:b]), (host[c:d], device[c:d])

    @staticmethod
    def bytes_for(rows: int, nodes: int) -> int:
        return rows * (24 * nodes + 64)

    def upload(self) -> None:
        self._up[0].copy_(self._up[1], non_blocking=True)

    def download(self) -> None:
        self._down[0].copy_(self._down[1], non_blocking=True)


class GraphedRounds:
    """The rounds of one model, and the KV slots that they work on. Used by one ``generate`` call at a time.

    A graph serves one number of rows and one number of nodes; lengths, trees and noise are tensors at fixed addresses,
    cut from buffers of the greatest size, and all graphs share one pool of memory (card tlt-adaptive, step 8). A shape
    that occurs for the first time runs without a graph, which warms libraries up; the second time it is recorded. On
    the device, a round leaves the next one's lengths and roots where it found its own, so that with one node per row
    replays go on by themselves.

    Args:
        recorder: of graphs.
        model: is not held.
        rows, slots: of the KV store at first: rows at most, slots as many as needed.
        max_nodes: of a tree.
        kv_scales: of a store in e4m3.

    Attributes:
        store: of the calls' KV.
        unfit: why this model cannot be recorded, if so; its rounds run without graphs.
        recorded: how many graphs were made.
    """

    def __init__(
        self,
        recorder: Recorder,
        model: PreTrainedModel,
        rows: int,
        slots: int,
        max_nodes: int,
        kv_scales: KVScales | None = None,
    ) -> None:
        self.store = StaticStore(rows, slots, kv_scales)
        self.unfit: str | None = None
        self.recorded = 0
        self._recorder = recorder
        self._weights = _addresses(model)
        self._rounds: dict[RoundKey, _Round] = {}
        self._capacity = self.store.capacity
        self._exchanges: dict[tuple[int, int], _Exchange] = {}
        size = _Exchange.bytes_for(rows, max_nodes)
        self._here = torch.zeros(size, dtype=torch.uint8, pin_memory=model.device.type == "cuda")
        self._there = torch.zeros(size, dtype=torch.uint8, device=model.device)

    def serve(self, model: PreTrainedModel, rows: int) -> bool:
        """Whether a batch of so many rows fits, and the model's weights are where they were."""
        return rows <= self.store.most_rows and self._weights == _addresses(model)

    def run(
        self,
        target: StoredModel,
        tree: TokenTree,
        noise: Noise,
        running: Tensor,
        rule: Rule | None,
        temperature: float = 1.0,
        keep_logits: bool = False,
    ) -> Outcome:
        """One round on the device; with a ``rule``, up to the commit, whose lengths the host has yet to note.

        Args:
            target: of ``store``.
            tree: padded to a size of :func:`padded_size`; its drafts must not have been drawn if a ``rule`` is given.
            running: bool[B], False for rows that have ended: nothing of theirs is kept.
            rule: None leaves verdict and commit to the caller, who gets the logits.

        Raises:
            RuntimeError: logits that are no distribution.
        """
        B, N = tree.shape
        self.store.reserve(N)
        if self.store.capacity != self._capacity:  # all slots have moved
            self._rounds.clear()
            self._capacity = self.store.capacity
        exchange = self._exchanges.get((B, N))
        if exchange is None:
            exchange = self._exchanges[B, N] = _Exchange(self._here, self._there, B, N)
        values = (tree.tokens, *noise.keys, tree.parents, self.store.seq_lens, running)
        for view, value in zip(exchange.trees, values, strict=True):
            view.copy_(value)
        exchange.upload()
        key = RoundKey(B, N, rule, temperature, keep_logits or rule is None, target.keep_hidden, target.deterministic)
        done = self._replay(key, target, exchange)
        target.hidden_states = done.hidden
        if rule is None:
            assert done.logits is not None
            wait_for(done.logits)
            return Outcome(None, done.logits)
        exchange.download()
        wait_for(self._there)
        bonus, nodes, count = (view.clone() for view in exchange.verdict)
        refuse_broken(count, bonus)
        return Outcome(Accepted(nodes, count, bonus), done.logits)

    def _replay(self, key: RoundKey, target: StoredModel, exchange: _Exchange) -> _Round:
        known = self._rounds.get(key)
        if known is None and self.unfit is None:
            with HostReads() as reads:
                done = self._rounds[key] = self._round(key, target, exchange)
            if reads.seen:
                self.unfit = f"{type(target.model).__name__} calls {reads.seen[0]} in its forward"
            return done
        if known is not None and known.recording is None and self.unfit is None:
            known = self._record(key, target, exchange)
        if known is None or known.recording is None:
            return self._round(key, target, exchange)
        known.recording.replay()
        return known

    def _record(self, key: RoundKey, target: StoredModel, exchange: _Exchange) -> _Round | None:
        try:
            recording, done = self._recorder.record(lambda: self._round(key, target, exchange))
        except RuntimeError as error:  # not worth a text; what the device cannot do at all is raised by what comes next
            self.unfit = str(error)
            return None
        done.recording = recording
        self._rounds[key] = done
        self.recorded += 1
        return done

    def _round(self, key: RoundKey, target: StoredModel, exchange: _Exchange) -> _Round:
        """What a graph holds: reads and writes tensors at fixed addresses, and never their values."""
        tokens, seeds, numbers, parents, lens, running = exchange.trees_there
        mask, positions, next_token, next_sibling = ops.build_tree(parents, lens)
        with self.store.lengths_on_device(lens):
            logits = target.forward(tokens, positions, mask if key.nodes > 1 else None)
        kept = _Round(logits if key.keep_logits else None, target.hidden_states if key.keep_hidden else None)
        if key.rule is None:
            return kept
        lengths = lens.long() + 1  # of the texts: all but the root is in the store
        uniforms = key.rule.uniforms(Noise.of(seeds, numbers), lengths, positions - lens[:, None])
        links = Links(tokens, next_token, next_sibling)
        accepted, count, bonus = key.rule.verify(links, uniforms, logits, key.temperature, None)
        bonus_out, accepted_out, count_out = exchange.verdict_there
        accepted_out.copy_(accepted)
        count_out.copy_(count)
        bonus_out.copy_(bonus)
        lens.copy_(ops.commit_kv(self.store.caches(), accepted, count * running, lens))
        tokens[:, 0].copy_(bonus)
        return kept
