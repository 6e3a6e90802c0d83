"""The loop that all block-wise decoders of masked-diffusion models are: ask, step, keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper

from ..attention import use_attention
from ..decoding.call import Call, Decoder
from ..decoding.request import Ending, pad_and_stack
from ..decoding.stats import DecodeStats
from ..decoding.tree_size import CostModel, cost_model
from ..noise import Noise, Seed, row_seeds
from ..target import ignores_text
from .canvas import Canvas
from .chances import CHOICES, ChainChances, Chances, Neighbours
from .engine import CopyEngine, Engine, PageEngine, PlainEngine, Processor, Sampler, TreeEngine
from .layout import CACHES, Layout
from .pace import LEAST_CHANCE, Pace
from .rules import Static, StepRule
from .spec import DiffusionSpec, runs_on_kernels, spec_of
from .window import Kind

_ENGINES = {"pages": PageEngine, "tree": TreeEngine, "copy": CopyEngine}


class BlockDecoder(Decoder):
    """A ``custom_generate`` callable for masked-diffusion models that unmasks block after block.

    One state per forward, and the step that the rule takes from it: static decoding (:class:`Static`), dynamic
    decoding (:class:`Threshold`, :class:`EntropyBudget`), Dream's (:class:`TimeSchedule`).
    :class:`branchwise.diffusion.FreeDave` gives the same text with fewer forwards. Any batch size, left-padded as
    usual; rows are independent of each other. ``stats`` describes the last finished call.

    With a temperature, the tokens of a row's positions are drawn with noise that belongs to the position, see
    :func:`branchwise.ops.confidence`: asked again, a position whose logits have not changed gives the same token.

    Args:
        rule: how many masks a step removes, and which.
        block_length: tokens that are unmasked together; None: the model's block size, or 32 for a full model. Must be
            the block size for a block-causal model.
        cache: "block" (block-causal models), "none", "prefix" or "dual" (full ones), see
            :class:`branchwise.diffusion.layout.Layout`; None: "block" or "none". "prefix" and "dual" change the text,
            the others don't.
        spec: what the model is; None: :func:`branchwise.diffusion.spec_of`.
        form: how states of one forward attend. "pages", as rows that name the same pages of keys: each is seen bit for
            bit as in a forward of its own. "tree", as branches of one mask. "copy", as rows of a batch with keys of
            their own, for comparison.
        seed: of the noise, see :func:`branchwise.noise.row_seeds`.
        on_state: called with a row's number and its tokens i64[n] after every forward.

    Raises:
        ValueError: an unknown option; when called: a model or request that does not fit, with the reason.

    Source: card dllm-baselines; card freedave, algorithm, step 1.
    """

    draft_length = 1
    table: Chances | None = None
    neighbours: Neighbours | None = None
    chain: ChainChances | None = None
    least_chance: float | None = 0.0

    def __init__(
        self,
        rule: StepRule | None = None,
        block_length: int | None = None,
        cache: str | None = None,
        spec: DiffusionSpec | None = None,
        form: str = "pages",
        seed: Seed = None,
        on_state: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        if block_length is not None and block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {block_length}")
        if cache is not None and cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
        if form not in _ENGINES:
            raise ValueError(f"form must be one of {', '.join(_ENGINES)}, got {form!r}")
        self.rule = Static() if rule is None else rule
        self.block_length, self.cache, self.spec = block_length, cache, spec
        self.form, self.seed, self.on_state = form, seed, on_state
        self.stats = DecodeStats()

    def decode(self, call: Call) -> Tensor:
        call.check(causal=False)
        model, input_ids = call.model, call.input_ids
        prompts = [prompt.cpu() for prompt in call.prompts]
        temperature, processors = sampling_of(call.decoder, call.config, call.processors)
        layout = self.layout(model)
        layout.spec.check_prompts(prompts)
        longest, stopping, pad = call.limits()
        new_tokens = longest - input_ids.shape[1]
        noise = Noise(
            row_seeds(self.seed, len(prompts)) if temperature else [0] * len(prompts), [p.numpy() for p in prompts]
        )
        choices = CHOICES if layout.guesses else 0
        sampler = Sampler(layout.spec, layout.rule.score, temperature, noise.position_keys, processors, choices)
        rows = [Canvas(layout, prompt, len(prompt) + new_tokens) for prompt in prompts]
        with use_attention(model) if runs_on_kernels(model) else nullcontext():
            begun = time.perf_counter()
            run = _Run(rows, self._engine(model, layout, rows), sampler, self.on_state)
            run.stats.seconds_prefill = time.perf_counter() - begun
            run.padding = [input_ids[b, :start] for b, start in enumerate(call.starts)]
            run.ended = Ending(stopping)
            run.streamer = call.streamer
            run.decode()
        self.stats = run.stats
        texts = [
            torch.cat([run.padding[b], row.tokens[: run.ends[b]]]).to(input_ids.device) for b, row in enumerate(rows)
        ]
        return pad_and_stack(texts, pad)

    def layout(self, model: PreTrainedModel) -> Layout:
        """How texts are cut for this model."""
        spec = spec_of(model) if self.spec is None else self.spec
        blocks = spec.attention == "block_causal"
        plain = not runs_on_kernels(model)
        cache = ("none" if plain or not blocks else "block") if self.cache is None else self.cache
        if (cache == "block") > blocks or (cache in ("prefix", "dual")) > (not blocks):
            raise ValueError(f"cache = {cache!r} does not fit a model with attention {spec.attention!r}")
        if cache != "none" and plain:
            raise ValueError(f"cache must be 'none' for {type(model).__name__}, whose attention cannot be replaced")
        block = self.block_length or spec.block_size or 32
        if blocks and block != spec.block_size:
            raise ValueError(f"block_length must be the model's block size {spec.block_size}, got {block}")
        ahead = self._ahead(block)
        if cache in ("prefix", "dual"):
            ahead = 0  # the next block begins with a forward of the whole text
        layout = Layout(spec, self.rule, cache, block, ahead, self.draft_length, self.table, self.neighbours)
        if self.least_chance is not None:
            return replace(layout, least_chance=self.least_chance)
        # Copies cost more than states of a tree, and are for comparison.
        cost = cost_model(model) if self.form != "copy" else CostModel()
        return replace(layout, least_chance=LEAST_CHANCE, pace=Pace(cost), chain=self.chain)

    def _ahead(self, block: int) -> int:
        return 0

    def _engine(self, model: PreTrainedModel, layout: Layout, rows: Sequence[Canvas]) -> Engine:
        if not runs_on_kernels(model):
            return PlainEngine(model, layout.spec)
        engine = _ENGINES[self.form](model, layout.spec, len(rows), max(row.size for row in rows) + 64)
        if layout.cache == "block":
            for row in rows:
                row.held = row.prompt // layout.block * layout.block
            if any(row.held for row in rows):
                engine.prefill([row.tokens[: row.held] for row in rows], layout.block)
        return engine


def sampling_of(
    name: str, config: GenerationConfig, processors: LogitsProcessorList | None
) -> tuple[float, list[Processor]]:
    """Temperature, and the other processors."""
    temperature, others = float(config.temperature or 1.0) if config.do_sample else 0.0, []
    for processor in processors or []:
        if isinstance(processor, TemperatureLogitsWarper):
            continue
        if not ignores_text(processor):
            raise ValueError(
                f"{name} cannot use {type(processor).__name__}: it reads the text before a token, and a diffusion "
                "model says tokens in any order"
            )
        others.append(processor)
    return temperature, others


class _Run:
    """One call."""

    padding: list[Tensor]
    ended: Ending
    streamer: Any

    def __init__(
        self,
        rows: list[Canvas],
        engine: Engine,
        sampler: Sampler,
        on_state: Callable[[int, Tensor], None] | None,
    ) -> None:
        self.rows, self.engine, self.sampler, self.on_state = rows, engine, sampler, on_state
        self.stats = DecodeStats(rule=type(rows[0].layout.rule).__name__, exact=True)
        self.said = [row.prompt for row in rows]  # tokens that the streamer and the criteria have seen
        self.ends = [row.length for row in rows]
        self.stats.row_forwards = engine.forwards * len(rows)  # the prompts'

    def decode(self) -> None:
        active = list(range(len(self.rows)))
        pace = self.rows[0].layout.pace
        while active:
            if pace is not None:
                pace.rows = len(active)
            begun = time.perf_counter()
            windows = [self.rows[b].window() for b in active]
            drafted = time.perf_counter()
            found = self.engine.ask(active, windows, self.sampler)
            done = time.perf_counter()
            before = [self.rows[b].taken for b in active]
            keep = [
                self.rows[b].take(window, predictions)
                for b, window, predictions in zip(active, windows, found, strict=True)
            ]
            self.engine.keep(keep)
            for b, window, taken in zip(active, windows, before, strict=True):
                if window.kind is Kind.VERIFY:
                    self.stats.drafted += len(window.states) - 1
                    self.stats.accepted += max(min(self.rows[b].taken - taken, len(window.states)) - 1, 0)
                if self.on_state is not None:
                    self.on_state(b, self.rows[b].tokens[: self.rows[b].length])
            self.stats.row_forwards += len(active)
            left = [b for b in active if not self._say(b)]
            if left and len(left) < len(active):
                self.engine.select_rows([active.index(b) for b in left])
            active = left
            ended = time.perf_counter()
            if pace is not None:
                pace.observe(sum(len(window.tokens) for window in windows), ended - begun)
            self.stats.seconds_draft += drafted - begun
            self.stats.seconds_forward += done - drafted
            self.stats.seconds_verify += ended - done
        self.stats.forwards = self.engine.forwards
        self.stats.emitted = sum(end - row.prompt for end, row in zip(self.ends, self.rows, strict=True))
        if self.streamer is not None:
            self.streamer.end()

    def _say(self, b: int) -> bool:
        """Tells streamer and criteria what has become known from the left; whether the row has ended."""
        row, padded = self.rows[b], len(self.padding[b])
        until = min(row.known, row.length)
        text = torch.cat([self.padding[b], row.tokens[:until]])[None]
        while self.said[b] < until:
            self.said[b] += 1
            if self.streamer is not None:
                self.streamer.put(row.tokens[self.said[b] - 1 : self.said[b]])
            if self.ended(text, padded + self.said[b]):
                self.ends[b] = self.said[b]
                return True
        return row.finished
