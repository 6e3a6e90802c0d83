"""Branches: texts of one model over a KV tree, forked, written and dropped as a search wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from ..acceptance import choose_rule
from ..drafters import Drafter
from ..forward import StoredModel
from ..kv import policy_of
from ..kv_tree import KVTree
from ..noise import Noise, Purpose
from ..target import Processor
from .monitor import Monitor
from .request import Ending
from .stats import DecodeStats
from .tree_run import TreeRun
from .tree_size import cost_model

Ends = Callable[[Tensor], bool]  # of a step, given its tokens i64[n]
Enough = Callable[[Sequence[tuple[Tensor, bool]]], bool]  # given what each branch wrote, and whether it ended


class Branches:
    """What the searches share. A branch is a number, as in :class:`branchwise.kv_tree.KVTree`; its text is the prompt
    and what was written behind it.

    Texts have the prompt's padding at their front, which processors and criteria see, as they do in plain decoding.

    Every branch draws with noise of its own, numbered in the order in which branches are first written; so branch i of
    n that are forked from the prompt draws as row i of n equal prompts does in one batch. All forwards that write have
    the same number of rows, so what a branch says does not depend, bit for bit, on which others are there (plain
    decoding; with drafts, on the sizes of all trees, hence up to rounding).

    Args:
        model: a supported model; the caller is inside ``torch.no_grad`` and
            :func:`branchwise.attention.use_attention`.
        config: of the ``generate`` call.
        processors, stopping: as plain decoding would apply them to this prompt and what follows it.
        longest: where texts end, padding included.
        padding: tokens at the front of the prompt that are none of its own.
        seed: of the noise.
        drafter: what drafts for every branch.
        max_nodes: per branch and forward, root included.
        monitor: is told of every round.
        first_number: of the noise of the first branch that is written.

    Attributes:
        tree: the KV store.
        texts: i64[n] of every branch.
        ended: branches that one of ``stopping`` has ended, or the end of the length.
        stats: counts of all runs.
        peak_bytes: most bytes of pages that branches held at the end of a run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        processors: Sequence[Processor],
        stopping: StoppingCriteriaList,
        longest: int,
        padding: int,
        seed: int,
        drafter: Drafter,
        max_nodes: int = 8,
        monitor: Monitor | None = None,
        first_number: int = 0,
    ) -> None:
        if policy_of(model) is not None:
            raise ValueError(f"{type(model).__name__} is under a KV policy; a search keeps a KV tree of its own")
        self.model, self.config, self.processors, self.stopping = model, config, processors, stopping
        self.longest, self.padding, self.seed, self.max_nodes, self.monitor = longest, padding, seed, max_nodes, monitor
        self._ended = Ending(stopping, longest)
        self.drafter = drafter
        self.tree = KVTree()
        self.texts: dict[int, Tensor] = {}
        self.ended: set[int] = set()
        self.stats = DecodeStats()
        self.peak_bytes = 0
        self._prompt = torch.empty(0, dtype=torch.int64)
        self._numbers: dict[int, int] = {}
        self._first_number = self._next_number = first_number
        self._stored = StoredModel(model, self.tree, deterministic=True)

    @property
    def cancelled(self) -> bool:
        return self.monitor is not None and self.monitor.cancelled

    def root(self, prompt: Tensor) -> int:
        """The branch of the prompt i64[n]; the first call's prompt keys the noise."""
        self._prompt = prompt if not self.texts else self._prompt
        branch = self.tree.root()
        self.texts[branch] = prompt
        return branch

    @property
    def prompt(self) -> Tensor:
        """i64[n], without padding."""
        return self._prompt[self.padding :]

    def uniforms(self, step: int, n: int) -> Tensor:
        """f64[n] for decisions about a step as a whole."""
        noise = Noise.numbered(self.seed, self.prompt, [self._first_number])
        return noise.row_uniforms(0, torch.full((n,), step), torch.arange(n), Purpose.VERIFY)[:, 0].double()

    def said(self, branch: int) -> Tensor:
        """i64[n] tokens behind the prompt."""
        return self.texts[branch][len(self._prompt) :]

    def fork(self, branch: int, n: int = 1) -> list[int]:
        """``n`` branches that continue ``branch``, which stays."""
        self.read(branch)
        forks = self.tree.fork(branch, n)
        self._inherit([branch] * n, forks)
        return forks

    def resample(self, branches: Sequence[int], ancestors: Sequence[int]) -> list[int]:
        """New branches in the place of the old ones, the i-th a fork of ``branches[ancestors[i]]``."""
        forks = self.tree.resample(branches, ancestors)
        self._inherit([branches[a] for a in ancestors], forks)
        self._forget(branches)
        return forks

    def prune(self, branches: Sequence[int]) -> None:
        self.tree.prune(branches)
        self._forget(branches)

    def renumber(self, branch: int) -> None:
        """Gives a branch fresh noise for what it will write."""
        self._numbers[branch] = self._next_number
        self._next_number += 1

    def truncate(self, branch: int, length: int) -> None:
        """Forgets the text of a branch from ``length`` on, padding included."""
        self.evict(branch, length)
        self.texts[branch] = self.texts[branch][:length]
        self.ended.discard(branch)

    def append(self, branch: int, tokens: Tensor, peeked: bool = False) -> None:
        """Adds i64[n] tokens that nobody has to say. They are read when the branch is written next, those that
        :meth:`peek` has just kept excepted."""
        if not peeked:
            self.evict(branch, len(self.texts[branch]))
        self.texts[branch] = torch.cat([self.texts[branch], tokens])
        self._note_end(branch)

    def evict(self, branch: int, length: int) -> None:
        """Gives back the pages of tokens from ``length`` on; they are read again when the branch is used next."""
        self.tree.truncate(branch, min(length - self.padding, self.tree.length(branch)))

    def peek(self, branch: int, tokens: Tensor, keep: int) -> Tensor:
        """Logits [n + 1, V] at the last token of the branch's text and at i64[n] ``tokens`` behind it, in one forward
        over what has no KV yet. The tokens do not become text, but the first ``keep`` of them stay read, for
        :meth:`append`."""
        text = self.texts[branch][self.padding :]
        self.evict(branch, self.padding + len(text) - 1)
        rest = torch.cat([text[self.tree.length(branch) :], tokens])
        self.tree.select([branch])
        try:
            positions = self.tree.seq_lens[:, None] + torch.arange(len(rest))
            wanted = range(len(rest) - len(tokens) - 1, len(rest))
            logits = self._stored.forward(rest[None], positions, wanted=wanted)
            self.tree.advance(torch.tensor([len(rest) - len(tokens) + keep], dtype=torch.int32))
        finally:
            self.tree.select([])
        return logits[0]

    def read(self, branch: int) -> None:
        """Brings the KV of a branch up to all but the last of its tokens, alone, so that nobody else matters."""
        text = self.texts[branch][self.padding :]
        held = self.tree.length(branch)
        if len(text) - 1 <= held:
            self.tree.truncate(branch, len(text) - 1)  # a broken-off run may have read the last one, too
            return
        self.tree.select([branch])
        try:
            self._stored.extend([text[held:-1]])
        finally:
            self.tree.select([])

    def write(
        self,
        branches: Sequence[int],
        width: int,
        ends: Ends | None = None,
        most: int | None = None,
        enough: Enough | None = None,
        begun: Mapping[int, int] | None = None,
    ) -> None:
        """Lets branches go on until each has ended, or its step has.

        Args:
            branches: those that have ended already are left alone.
            width: branches that write at the same time; more take turns.
            ends: of a step, see :class:`StepEnd`; None: only a text ends.
            most: tokens of a step; None: any number.
            enough: asked after every round about the branches that take this turn; True stops them.
            begun: lengths of the texts where the step in hand began; None: it begins now.
        """
        branches = [branch for branch in branches if branch not in self.ended]
        begun = {branch: len(self.texts[branch]) for branch in branches} if begun is None else begun
        for branch in branches:
            if branch not in self._numbers:
                self.renumber(branch)
            self.read(branch)
        for first in range(0, len(branches), width):
            if not self.cancelled:
                self._run(branches[first : first + width], ends, most, enough, begun)

    def _run(
        self,
        branches: Sequence[int],
        ends: Ends | None,
        most: int | None,
        enough: Enough | None,
        begun: Mapping[int, int],
    ) -> None:
        per_row = [self.processors] * len(branches)
        sampling = bool(self.config.do_sample)
        rule = choose_rule(None, self.drafter.draws, sampling, per_row)
        noise = Noise.numbered(self.seed, self.prompt, [self._numbers[b] for b in branches])
        more = self.longest if most is None else most
        longest = [min(self.longest, len(self.texts[branch]) + more) for branch in branches]
        stops = [
            StoppingCriteriaList([*self.stopping, *([] if ends is None else [_Step(ends, begun[branch])])])
            for branch in branches
        ]
        run = TreeRun(
            self.model,
            self.config,
            rule,
            per_row,
            noise,
            stops,
            None,
            self.max_nodes,
            cost_model(self.model),
            None,
            self.monitor,
            enough=enough,
            deterministic=True,
        )
        texts = [self.texts[branch] for branch in branches]
        self.tree.select(branches)
        try:
            run.decode(self.drafter, texts, [self.padding] * len(branches), longest, self.tree)
        finally:
            # What a row says is whole tokens at any time; the KV of all but the last of them is there.
            for branch, room, length in zip(branches, run.texts, run.lengths, strict=False):
                self.texts[branch] = room[0, :length].clone()
                self._note_end(branch)
            self.tree.select([])
            self.peak_bytes = max(self.peak_bytes, self.tree.used_bytes)
            self.stats.add(run.stats)

    def _note_end(self, branch: int) -> None:
        text = self.texts[branch][None]
        if self._ended(text):
            self.ended.add(branch)

    def _inherit(self, parents: Sequence[int], forks: Sequence[int]) -> None:
        for parent, fork in zip(parents, forks, strict=True):
            self.texts[fork] = self.texts[parent]
            if parent in self.ended:
                self.ended.add(fork)

    def _forget(self, branches: Sequence[int]) -> None:
        for branch in set(branches):
            del self.texts[branch]
            self.ended.discard(branch)


class _Step:
    """A stopping criterion that sees what was said since ``start``."""

    def __init__(self, ends: Ends, start: int) -> None:
        self._ends, self._start = ends, start

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        return torch.tensor([self._ends(input_ids[0, self._start :])])


class StepEnd:
    """Whether the text of a step's tokens contains a string, wherever tokens begin and end in it.

    Args:
        tokenizer: anything with ``decode``.
        string: what ends a step.
        window: how many tokens the string can be spread over at most, and what a token needs before it to be decoded.
    """

    def __init__(self, tokenizer: object, string: str = "\n\n", window: int = 8) -> None:
        if not string:
            raise ValueError("string must not be empty")
        self._decode, self._string = tokenizer.decode, string  # type: ignore[attr-defined]
        self._window = max(window, len(string))

    def __call__(self, tokens: Tensor) -> bool:
        return self._string in self._decode(tokens[-self._window :].tolist())
