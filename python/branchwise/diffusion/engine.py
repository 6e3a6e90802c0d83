"""Forwards of a diffusion model over the states that rows want predictions for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import pack_mask
from ..cache import KVStore
from ..forward import StoredModel
from .group_rows import GroupRows
from .model import block_pattern
from .spec import DiffusionSpec
from .window import Kind, Predictions, Window

_CHUNK = 2048  # prompt tokens per forward
Processor = Callable[[Tensor, Tensor], Tensor]
Keys = Callable[[int, Tensor], Tensor]  # noise of a row's positions, i64[n]
Found = TypeVar("Found", covariant=True)


class Reader(Protocol[Found]):
    """What is made of a row's logits."""

    def read(self, row: int, window: Window, logits: Tensor) -> Found:
        """Of one row, given [m, V] of the wanted nodes in their order."""
        ...


class Sampler:
    """From logits to tokens and scores.

    Args:
        spec: of the model.
        score: see :func:`branchwise.ops.confidence`.
        temperature: 0 for the likeliest token.
        keys: noise of a row's positions.
        processors: that look at the scores alone.
        choices: likeliest tokens to report, beside the one that is said.
    """

    def __init__(
        self,
        spec: DiffusionSpec,
        score: str,
        temperature: float,
        keys: Keys,
        processors: Sequence[Processor],
        choices: int = 0,
    ) -> None:
        self.choices = choices
        self.spec, self.score, self.temperature = spec, score, temperature
        self._keys, self._processors = keys, processors
        self._exclude = torch.tensor(spec.never_said)

    def read(self, row: int, window: Window, logits: Tensor) -> Predictions:
        n = len(window.tokens)
        made = Predictions(window.tokens.numpy().copy(), np.full(n, -np.inf, np.float32))
        if self.choices:
            made.choices, made.chances = np.zeros((n, self.choices), np.int64), np.zeros((n, self.choices), np.float32)
        if len(logits) == 0:
            return made
        at = np.flatnonzero(window.wanted.numpy())
        positions = window.positions[torch.from_numpy(at)]
        keys = self._keys(row, positions) if self.temperature else None
        found, sure = ops.confidence(logits.contiguous(), self._exclude, self.temperature, keys, self.score)
        if self._processors:
            # Scores stay those of the logits as they are: what a filter leaves over is no measure of being sure.
            raw = processed = logits.float().index_fill(1, self._exclude, -torch.inf)
            for processor in self._processors:
                processed = processor(positions[:, None], processed)
            found, _ = ops.confidence(processed.contiguous(), self._exclude, self.temperature, keys)
            if self.score == "probability":
                sure = raw.softmax(-1).gather(1, found.clamp(min=0)[:, None])[:, 0]
        if int(found.min()) < 0:
            place = int(positions[found < 0][0])
            raise RuntimeError(f"the model's logits at position {place} of row {row} are NaN, infinite or all -inf")
        made.tokens[at], made.scores[at] = found.numpy(), sure.numpy()
        if made.choices is not None and made.chances is not None:
            likeliest, log_probs = ops.top_tokens(logits, self.choices, self._exclude)
            if self.temperature:  # only the token that was drawn can be guessed
                likeliest[:, 0] = found.int()
            made.choices[at], made.chances[at] = likeliest.numpy().clip(0), np.exp(log_probs.numpy())
        return made


class Engine(Protocol):
    @property
    def forwards(self) -> int: ...

    def prefill(self, prompts: Sequence[Tensor], block: int) -> None:
        """Keeps the keys of prompts, i64[n_b] each, whole blocks of a block-causal model."""
        ...

    def ask(self, rows: Sequence[int], windows: Sequence[Window], reader: Reader[Found]) -> list[Found]:
        """One forward, if the engine can; ``rows`` are the rows' numbers in the batch."""
        ...

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keeps the keys of some of the last forward's nodes, per row."""
        ...

    def select_rows(self, rows: list[int]) -> None: ...


class TreeEngine:
    """All states of all rows in one forward: states are branches of a tree mask over the keys that a row shares."""

    def __init__(self, model: PreTrainedModel, spec: DiffusionSpec, batch_size: int, capacity: int) -> None:
        self.store = KVStore(batch_size, capacity)
        self.spec, self._target = spec, StoredModel(model, self.store)

    @property
    def forwards(self) -> int:
        return self._target.forwards

    def prefill(self, prompts: Sequence[Tensor], block: int) -> None:
        longest = max(len(prompt) for prompt in prompts)
        tokens = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        step = max(_CHUNK // block, 1) * block
        for begin in range(0, longest, step):
            chunk = tokens[:, begin : begin + step]
            B, n = chunk.shape
            sees = block_pattern(n, block).expand(B, -1, -1)
            positions = self.store.seq_lens[:, None] + torch.arange(n)
            self._target.forward(chunk, positions, pack_mask(sees), wanted=[0])
            self.store.advance((lengths - begin).clamp(0, n))

    def ask(self, rows: Sequence[int], windows: Sequence[Window], reader: Reader[Found]) -> list[Found]:
        self._hold([window.held for window in windows])
        T = max(len(window.tokens) for window in windows)
        tokens = np.full((len(windows), T), self.spec.mask_id)
        positions = np.zeros((len(windows), T), np.int64)
        for b, window in enumerate(windows):
            n = len(window.tokens)
            tokens[b, :n], positions[b, :n] = window.tokens, window.positions
        nodes = [np.flatnonzero(window.wanted) - self.spec.shift for window in windows]
        wanted = np.unique(np.concatenate(nodes)).tolist() or [0]
        logits = self._forward(windows, torch.from_numpy(tokens), torch.from_numpy(positions), wanted)
        place = [torch.from_numpy(np.searchsorted(wanted, own)) for own in nodes]
        return [reader.read(rows[b], window, logits[b, place[b]]) for b, window in enumerate(windows)]

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        if not any(nodes):
            return  # the next forward writes over this one's
        count = torch.tensor([len(row) for row in nodes], dtype=torch.int32)
        accepted = torch.zeros(len(nodes), int(count.max()), dtype=torch.int32)
        for b, row in enumerate(nodes):
            accepted[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
        self.store.commit(accepted, count)

    def select_rows(self, rows: list[int]) -> None:
        self.store.select_rows(rows)

    def _forward(self, windows: Sequence[Window], tokens: Tensor, positions: Tensor, wanted: Sequence[int]) -> Tensor:
        """Logits [B, len(wanted), V] of the windows' nodes, and of more up to the longest, i64[B, T]."""
        sees = torch.eye(tokens.shape[1], dtype=torch.bool).repeat(len(windows), 1, 1)
        for b, window in enumerate(windows):
            n, groups = len(window.tokens), window.sees
            sees[b, :n, :n] = groups.repeat_interleave(window.width, 0).repeat_interleave(window.width, 1)
        return self._target.forward(tokens, positions, pack_mask(sees), wanted=wanted)

    def _hold(self, held: Sequence[int]) -> None:
        """What rows build on: nothing, where the whole text is seen anew."""
        self.store.set_lengths(torch.tensor(held, dtype=torch.int32))


class PageEngine(TreeEngine):
    """The same, with states, or blocks of them, as rows of the attention: see :class:`GroupRows`."""

    def _forward(self, windows: Sequence[Window], tokens: Tensor, positions: Tensor, wanted: Sequence[int]) -> Tensor:
        self._target.kv = GroupRows(windows)  # not for prompts, which have no states
        return self._target.forward(tokens, positions, wanted=wanted)


class CopyEngine(TreeEngine):
    """Every state a row of a batch, over a copy of the keys it builds on: what :class:`TreeEngine` must equal."""

    def ask(self, rows: Sequence[int], windows: Sequence[Window], reader: Reader[Found]) -> list[Found]:
        self._hold([window.held for window in windows])
        owners = [b for b, window in enumerate(windows) for _ in window.states]
        W = max(window.states.shape[1] for window in windows)
        self._copies, self._windows = self.store.copy_rows(owners), windows
        self._firsts = [owners.index(b) for b in range(len(windows))]
        tokens = torch.full((len(owners), W), self.spec.mask_id)
        positions = torch.zeros(len(owners), W, dtype=torch.int64)
        sees = torch.eye(W, dtype=torch.bool).repeat(len(owners), 1, 1)
        for i, b in enumerate(owners):
            window, n = windows[b], windows[b].states.shape[1]
            tokens[i, :n] = window.states[i - self._firsts[b]]
            positions[i, :n] = torch.arange(n) + window.start
            sees[i, :n, :n] = block_pattern(n, window.block or n)
        logits = StoredModel(self._target.model, self._copies).forward(tokens, positions, pack_mask(sees))
        self._target.forwards += 1
        found = []
        for b, window in enumerate(windows):
            state, at = (x[window.wanted] for x in window.places)
            found.append(reader.read(rows[b], window, logits[self._firsts[b] + state, at - self.spec.shift]))
        return found

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        count = torch.tensor([len(row) for row in nodes], dtype=torch.int32)
        for i, theirs in enumerate(self._copies.layers):
            mine = self.store.layer(i)
            if not mine.is_initialized:
                first = [0] * len(nodes)
                mine.lazy_initialization(theirs.keys[first], theirs.values[first])
        self.store.reserve(int(count.max()))
        for b, row in enumerate(nodes):
            begin = int(self.store.seq_lens[b])
            state, at = (x[list(row)] for x in self._windows[b].places)
            for mine, theirs in zip(self.store.layers, self._copies.layers, strict=True):
                for to, of in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    to[b, :, begin : begin + len(row)] = of[self._firsts[b] + state, :, begin + at].transpose(0, 1)
        self.store.advance(count)


class PlainEngine:
    """Whole texts through the model's own forward, whatever its code is; one row at a time and no cache."""

    def __init__(self, model: PreTrainedModel, spec: DiffusionSpec) -> None:
        self.model, self.spec, self.forwards = model, spec, 0

    def prefill(self, prompts: Sequence[Tensor], block: int) -> None:
        raise ValueError(f"{type(self.model).__name__} runs its own attention: cache must be 'none'")

    def ask(self, rows: Sequence[int], windows: Sequence[Window], reader: Reader[Found]) -> list[Found]:
        found = []
        for row, window in zip(rows, windows, strict=True):
            assert window.kind is not Kind.REFRESH
            options = {}
            if self.spec.attention == "block_causal":
                k, W = window.states.shape
                sees = block_pattern(W, window.block).expand(k, 1, -1, -1)
                options["attention_mask"] = sees.to(self.model.device)
            logits = self.model(input_ids=window.states.to(self.model.device), **options).logits.cpu()
            state, at = (x[window.wanted] for x in window.places)
            found.append(reader.read(row, window, logits[state, at - self.spec.shift]))
        self.forwards += len(windows)
        return found

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        pass

    def select_rows(self, rows: list[int]) -> None:
        pass
