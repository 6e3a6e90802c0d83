"""StepSpeculative: a small model writes whole steps, a large one judges them and rewrites the bad ones (card
specreason)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from ..attention import check_supported, use_attention
from ..drafters import Drafter, DraftRequest, Model, NoDrafts
from ..forward import StoredModel
from ..noise import Seed, first_numbers, row_seeds
from ..target import Processor
from .auto import drafter_of
from .branches import Branches, Ends
from .call import Call, Decoder
from .monitor import Monitor, watch
from .request import pad_and_stack
from .stats import DecodeStats
from .step_scores import Scorer, StopRule, repeated_step

SMALL, BASE, USER = "small", "base", "closing"


@dataclass
class StepTrace:
    """How one row was written.

    Attributes:
        steps: in order: its tokens, who wrote it ("small", "base", or "closing" for tokens that were put there), the
            score if it got one; of a step that the base model rewrote also what was "rejected".
        stopped: which rule ended thinking early: "budget", the name of a stop rule, or "".
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""

    @property
    def tokens(self) -> list[int]:
        return [token for step in self.steps for token in step["tokens"]]

    @property
    def writers(self) -> list[str]:
        """Per token, who wrote it."""
        return [step["writer"] for step in self.steps for _ in step["tokens"]]

    @property
    def share_of_small(self) -> float:
        """Of all tokens."""
        return self.writers.count(SMALL) / max(len(self.writers), 1)


class StepSpeculative(Decoder):
    """A ``custom_generate`` callable for the base model, **lossy** (SpecReason, Pan et al. 2025, arXiv 2504.07891).

    The small model writes a step of the reasoning. The base model reads it, and behind it what the scorer asks, in one
    forward over these tokens alone; a step with a score of at least ``threshold`` stays, any other is written anew by
    the base model, with a draft tree from the small one in every round. Both models keep the KV of the text for good:
    nothing is read twice, and all is token ids. When thinking is over, the base model writes the answer.

    With a threshold that no score reaches, the text is the base model's own, token for token. Rows of a batch are
    written one after another. ``traces`` and ``stats`` (of what the base model writes) describe the last call.

    Args:
        small: a decoder-only model with the base model's tokenizer.
        scorer: :class:`JudgeScore`, :class:`LogProbabilityScore`, or a function (context, step) -> float of token ids.
        ends: whether a step is over, given its tokens: ``StepEnd(tokenizer)`` for blank lines.
        threshold: least score of a step that stays; 0 to 9 for a judge, nats for log-probabilities.
        step_tokens: most tokens of a step.
        first_base_steps: steps that the base model writes without asking.
        thought: whether thinking is over, given a step's tokens; it ends the step, too:
            ``StepEnd(tokenizer, "</think>")``. None: steps go on to the end of the text.
        budget: tokens of thinking.
        stop_rules: end thinking when one of them says so, given the accepted steps; an :class:`AnswerFound`, for
            example.
        closing: i64[n] tokens that are put where thinking was ended early: the ids of "</think>\\n\\n", for example.
        drafter: for what the base model writes; None: trees of the small model, over its own KV of the text.
        max_nodes: per draft tree, root included.
        seed: of the noise when sampling. The two models draw independently.
        monitor: shows progress, and ends calls early with what there is.

    Raises:
        ValueError: an option outside its range, an unsupported model; when called, other vocabularies.
    """

    def __init__(
        self,
        small: PreTrainedModel,
        scorer: Scorer | Callable[[Tensor, Tensor], float],
        ends: Ends,
        threshold: float = 7.0,
        step_tokens: int = 512,
        first_base_steps: int = 0,
        thought: Ends | None = None,
        budget: int = 8192,
        stop_rules: Sequence[StopRule] = (repeated_step,),
        closing: Tensor | None = None,
        drafter: str | Drafter | None = None,
        max_nodes: int = 16,
        seed: Seed = None,
        monitor: Monitor | None = None,
    ) -> None:
        for name, value, least in (("step_tokens", step_tokens, 1), ("budget", budget, 0), ("max_nodes", max_nodes, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if first_base_steps < 0:
            raise ValueError(f"first_base_steps must be at least 0, got {first_base_steps}")
        check_supported(small)
        self.small, self.scorer, self.ends, self.threshold = small, scorer, ends, threshold
        self.step_tokens, self.first_base_steps, self.thought, self.budget = (
            step_tokens,
            first_base_steps,
            thought,
            budget,
        )
        self.stop_rules, self.closing = stop_rules, torch.empty(0, dtype=torch.int64) if closing is None else closing
        self.drafter = None if drafter is None else drafter_of(drafter)
        self.max_nodes, self.seed, self.monitor = max_nodes, seed, monitor
        self.traces: list[StepTrace] = []
        self.stats = DecodeStats()

    def decode(self, call: Call) -> Tensor:
        call.check()
        model, input_ids, streamer = call.model, call.input_ids, call.streamer
        sizes = [m.config.get_text_config().vocab_size for m in (self.small, model)]
        if sizes[0] > sizes[1]:
            raise ValueError(
                f"the small model must say tokens of the base model only; their vocabularies have {sizes[0]} and "
                f"{sizes[1]} tokens"
            )
        longest, stopping, pad = call.limits()
        starts = call.starts
        processors = call.row_processors(max(len(starts), 2))  # two models share a row's
        seeds = row_seeds(self.seed, len(starts))
        numbers = first_numbers(seeds, call.prompts)
        self.traces, self.stats = [], DecodeStats()
        texts = []
        most = len(starts) * (longest - input_ids.shape[1])
        with use_attention(model), use_attention(self.small), watch(self.monitor, most):
            for row, (start, seed, number) in enumerate(zip(starts, seeds, numbers, strict=True)):
                common = call.config, processors[row], stopping, longest, start, seed
                run = _Row(self, model, common, number, input_ids[row])
                self.traces.append(run.trace)
                try:
                    run.write(streamer)
                finally:
                    self.stats.add(run.base.stats)
                texts.append(run.text)
        if streamer is not None:
            streamer.end()
        return pad_and_stack(texts, pad)


class _Row:
    """One text, as a branch of each model; ``common``: what both take alike, see :class:`Branches`."""

    def __init__(
        self,
        options: StepSpeculative,
        model: PreTrainedModel,
        common: tuple[GenerationConfig, Sequence[Processor], StoppingCriteriaList, int, int, int],
        number: int,
        prompt: Tensor,
    ) -> None:
        self.options, self.trace = options, StepTrace()
        eos = getattr(common[0], "_eos_token_tensor", None)  # set by generate
        self.eos = set() if eos is None else set(eos.flatten().tolist())
        self.little = Branches(options.small, *common, NoDrafts(), first_number=number + 1)
        self.small = self.little.root(prompt)
        drafter = _Continues(self.little, self.small) if options.drafter is None else options.drafter
        self.base = Branches(model, *common, drafter, options.max_nodes, options.monitor, number)
        self.root = self.base.root(prompt)

    @property
    def text(self) -> Tensor:
        return self.base.texts[self.root]

    @property
    def ended(self) -> bool:
        return self.root in self.base.ended or self.base.cancelled

    def write(self, streamer: Any) -> None:
        options = self.options
        steps: list[Tensor] = []
        while not self.ended:
            left = options.budget - len(self.base.said(self.root))
            if options.thought is not None and steps and options.thought(steps[-1]):
                break
            if left <= 0:
                self.trace.stopped = "budget"
            elif steps:
                rules = (rule for rule in options.stop_rules if rule(steps))
                rule = next(rules, None)
                self.trace.stopped = "" if rule is None else getattr(rule, "__name__", type(rule).__name__)
            if self.trace.stopped:
                room = self.base.longest - len(self.text)
                self._say({"tokens": options.closing[:room].tolist(), "writer": USER}, streamer)
                break
            begun = len(self.text)
            self._step(len(self.trace.steps) < options.first_base_steps, min(left, options.step_tokens), streamer)
            steps.append(self.text[begun:])
        if not self.ended:
            begun = len(self.text)
            self._write_base(None, None)
            self._say({"tokens": self.text[begun:].tolist(), "writer": BASE}, streamer, said=True)

    def _step(self, forced: bool, most: int, streamer: Any) -> None:
        options = self.options
        event: dict[str, Any] = {}
        if not forced:
            begun = len(self.text)
            self.little.write([self.small], 1, self._ends, most)
            step = self.little.texts[self.small][begun:]
            event["score"] = self._score(step)
            if event["score"] >= options.threshold:
                self._say({"tokens": step.tolist(), "writer": SMALL, **event}, streamer, peeked=True)
                return
            event["rejected"] = step.tolist()
            self.little.truncate(self.small, begun)
            self.little.renumber(self.small)  # what it says next must not depend on what was rejected
        begun = len(self.text)
        self._write_base(self._ends, most)
        self._say({"tokens": self.text[begun:].tolist(), "writer": BASE, **event}, streamer, said=True)

    def _ends(self, step: Tensor) -> bool:
        thought = self.options.thought
        return self.options.ends(step) or (thought is not None and thought(step))

    def _score(self, step: Tensor) -> float:
        scorer: Any = self.options.scorer
        if not hasattr(scorer, "suffix"):
            return float(scorer(self.text[self.base.padding :], step))
        if len(scorer.suffix) and int(step[-1]) in self.eos:
            step = step[:-1]  # the suffix ends the turn itself
        return float(scorer(step, self.base.peek(self.root, torch.cat([step, scorer.suffix]), len(step))))

    def _write_base(self, ends: Ends | None, most: int | None) -> None:
        try:
            self.base.write([self.root], 1, ends, most)
        finally:
            self.little.tree.select([])  # the drafter may have had it in hand

    def _say(self, event: dict[str, Any], streamer: Any, said: bool = False, peeked: bool = False) -> None:
        """Makes a step part of both models' texts; ``said``: the base model's has it already; ``peeked``: it has read
        it."""
        tokens = torch.tensor(event["tokens"], dtype=torch.int64)
        if len(tokens) == 0:
            return
        self.trace.steps.append(event)
        if not said:
            self.base.append(self.root, tokens, peeked and hasattr(self.options.scorer, "suffix"))
            if self.options.monitor is not None:
                self.options.monitor.advance(len(tokens))
        self.little.texts[self.small] = self.text
        if streamer is not None:
            streamer.put(tokens)


class _Continues(Model):
    """Draft trees of the small model over the KV that it has of the text."""

    def __init__(self, little: Branches, branch: int) -> None:
        super().__init__(little.model)
        self._little, self._branch = little, branch

    def open(self, request: DraftRequest) -> StoredModel:
        # What the small model wrote itself and had to take back is gone from its text already.
        self._little.evict(self._branch, self._little.padding + len(request.prompts[0]) - 1)
        self._little.tree.select([self._branch])
        return StoredModel(self.model, self._little.tree)
