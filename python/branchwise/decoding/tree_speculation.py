"""Tree speculation: guess a tree, score it in one forward, keep the path the target agrees with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ..acceptance import GREEDY, Accepted, Rule, choose_rule
from ..attention import AttentionPlan, check_supported, use_attention
from ..cache import KVStore
from ..drafters import Drafter, make_drafter
from ..noise import Noise, Purpose, Seed, row_seeds
from ..target import Target
from ..tree import DrawKind, RowTree, TokenTree
from .proposals import check_proposals
from .request import callers_streamer, check_request, pad_and_stack, prompt_starts, row_processors
from .stats import DecodeStats
from .tree_size import CostModel, TreeSizer

# What a forward of a model costs is the same for all decoders; what texts are like is not shared.
_COSTS: WeakKeyDictionary[PreTrainedModel, CostModel] = WeakKeyDictionary()
_PREFILL_CHUNK = 2048  # prompt tokens per forward: bounds activations and workspace


@dataclass
class TreeSpeculationOutput(GenerateDecoderOnlyOutput):
    """What plain ``generate`` returns with ``return_dict_in_generate``, and ``stats``; the cache is a KVStore."""

    stats: DecodeStats | None = None


class TreeSpeculation:
    """A ``custom_generate`` callable: ``model.generate(**inputs, custom_generate=TreeSpeculation())``.

    Greedy decoding gives the tokens of plain ``generate`` (fp32: token for token). Sampling keeps the target's
    distribution exactly; for retrieved drafts it gives the very tokens of :class:`branchwise.PositionKeyedSampler`
    with the same seed. Logits processors see each node's own text. Any batch size, left-padded as usual.

    One object keeps what its drafter and its cost estimates learned across calls; make one per user if texts must not
    influence each other's speed. ``stats`` describes the last finished call.

    Args:
        drafter: "trie", "prompt_lookup", or any :class:`branchwise.drafters.Drafter`.
        max_nodes: most nodes per row and forward, root included.
        adaptive: verify only as many nodes as pay, by measured cost and acceptance; False always uses ``max_nodes``.
            Drafts that are drawn are never cut, as that would depend on the draws.
        rule: an acceptance rule or its name; None for the exact one that accepts most, see
            :func:`branchwise.acceptance.choose_rule`.
        seed: of the noise when sampling, see :func:`branchwise.noise.row_seeds`. A row's noise depends on its seed
            and its prompt, not on the rest of the batch.

    Raises:
        ValueError: unknown drafter, ``max_nodes`` outside 1..1024; and when called: an unsupported model or request,
            or a rule that does not fit.
    """

    def __init__(
        self,
        drafter: str | Drafter = "trie",
        max_nodes: int = 32,
        adaptive: bool = True,
        rule: str | Rule | None = None,
        seed: Seed = None,
    ) -> None:
        if not 1 <= max_nodes <= 1024:
            raise ValueError(f"max_nodes must lie between 1 and 1024, got {max_nodes}")
        self.drafter = make_drafter(drafter)
        self.max_nodes = max_nodes
        self.adaptive = adaptive
        self.rule = rule
        self.seed = seed
        self.stats = DecodeStats()
        self._sizers: WeakKeyDictionary[PreTrainedModel, TreeSizer] = WeakKeyDictionary()

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | TreeSpeculationOutput:
        config = generation_config or model.generation_config
        check_supported(model)
        check_request("TreeSpeculation", config, model_kwargs)
        processors = row_processors(logits_processor, input_ids.shape[0])
        rule = choose_rule(self.rule, self.drafter.draws, bool(config.do_sample), processors)
        starts = prompt_starts(input_ids, model_kwargs.get("attention_mask"))
        prompts = [input_ids[b, start:] for b, start in enumerate(starts)]
        seeds = row_seeds(self.seed, len(prompts)) if config.do_sample or not rule.exact else [0] * len(prompts)
        adaptive = self.adaptive and self.drafter.draws is DrawKind.DETERMINISTIC
        sizer = self._sizers.setdefault(model, TreeSizer(_COSTS.setdefault(model, CostModel())))
        run = _Run(
            model=model,
            config=config,
            rule=rule,
            processors=processors,
            noise=Noise(seeds, [prompt.numpy() for prompt in prompts]),
            stopping=stopping_criteria or StoppingCriteriaList(),
            streamer=streamer if streamer is not None else callers_streamer(),
            max_nodes=self.max_nodes,
            sizer=sizer if adaptive else None,
        )
        with use_attention(model):
            result = run.decode(self.drafter, input_ids, prompts)
        self.stats = run.stats
        return result


class _Run:
    """One ``generate`` call. Rows that finish leave the batch; ``rows[i]`` is the original row of batch index i."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        rule: Rule,
        processors: Sequence[Any],
        noise: Noise,
        stopping: StoppingCriteriaList,
        streamer: Any,
        max_nodes: int,
        sizer: TreeSizer | None,
    ) -> None:
        self.model, self.config, self.rule, self.processors, self.noise = model, config, rule, processors, noise
        self.stopping, self.streamer, self.max_nodes, self.sizer = stopping, streamer, max_nodes, sizer
        self.stats = DecodeStats(rule=rule.name, exact=rule.exact)
        self.keep_finished = bool(config.return_dict_in_generate)  # the returned cache must hold every row
        self.keep_scores = self.keep_finished and bool(config.output_scores or config.output_logits)

    def decode(self, drafter: Drafter, input_ids: Tensor, prompts: list[Tensor]) -> Tensor | TreeSpeculationOutput:
        B, length = input_ids.shape
        self.draws = drafter.draws
        self.padding = [length - len(prompt) for prompt in prompts]
        self.max_length = self.stopping.max_length or self.config.max_length
        # Texts as plain generate's processors and criteria see them, padding included.
        room = max(self.max_length, length) + self.max_nodes + 1
        self.texts = [torch.nn.functional.pad(input_ids[b : b + 1], (0, room - length)) for b in range(B)]
        self.lengths = [length] * B
        self.scores: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(B)]
        self.stats.accepted_flags = [[] for _ in range(B)]
        self.rows = list(range(B))
        self.finished = [False] * B

        eos = getattr(self.config, "_eos_token_tensor", None)  # set by generate
        session = drafter.begin(
            [prompt.numpy().astype(np.int32) for prompt in prompts],
            frozenset() if eos is None else frozenset(eos.flatten().tolist()),
            self.noise,
        )
        try:
            self.prefill(prompts, session)
            while self.rows and not all(self.finished):
                self.round(session)
        finally:
            session.close()
        if self.streamer is not None:
            self.streamer.end()
        return self.result()

    def prefill(self, prompts: list[Tensor], session: Any) -> None:
        """Runs the prompts, ragged and without their padding, and emits the first token of every row."""
        begun = time.perf_counter()
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        longest = int(lengths.max())
        new_tokens = max(self.max_length - self.lengths[0], 1)
        self.store = KVStore(len(prompts), longest + min(new_tokens, 512) + self.max_nodes)
        tokens = pad_and_stack(prompts, 0)
        logits: Tensor | None = None
        for begin in range(0, longest, _PREFILL_CHUNK):
            chunk = tokens[:, begin : begin + _PREFILL_CHUNK]
            # A row that ended in an earlier chunk writes behind its end, where the next append overwrites it.
            ends = (lengths - begin).clamp(0, chunk.shape[1])
            here = torch.nonzero((ends > 0) & (lengths <= begin + chunk.shape[1])).flatten().tolist()
            wanted = sorted({int(ends[b]) - 1 for b in here}) or [0]
            out = self.forward(chunk, self.store.seq_lens[:, None] + torch.arange(chunk.shape[1]), None, wanted)
            logits = out.new_empty(len(prompts), 1, out.shape[-1]) if logits is None else logits
            for b in here:
                logits[b, 0] = out[b, wanted.index(int(ends[b]) - 1)]
            self.store.advance(ends)
        assert logits is not None
        self.stats.seconds_prefill = time.perf_counter() - begun

        roots = TokenTree([RowTree.root(int(prompt[-1])) for prompt in prompts], self.store.seq_lens)
        self.accept(roots, logits, session)
        self.drop_finished(session)

    def round(self, session: Any) -> None:
        begun = time.perf_counter()
        budgets = [self.budget(i) for i in range(len(self.rows))]
        roots = [int(self.texts[row][0, self.lengths[row] - 1]) for row in self.rows]
        vocabulary = self.model.config.get_text_config().vocab_size
        trees = check_proposals(session.propose(budgets), budgets, roots, vocabulary, self.draws)
        # Nodes that could not be emitted before max_length are not worth a forward.
        depths = [self.max_length - self.lengths[row] - 1 for row in self.rows]
        trees = [tree.up_to_depth(depth) for tree, depth in zip(trees, depths, strict=True)]
        if self.sizer is not None:
            trees = self.sizer.choose(trees)
        tree = TokenTree(trees, self.store.seq_lens, self.draws)
        drafted = time.perf_counter()
        logits = self.forward(tree.tokens, tree.positions, None if tree.is_chain else tree.tree_mask, None)
        done = time.perf_counter()
        if self.sizer is not None:
            self.sizer.cost.observe(tree.tokens.numel(), done - drafted)
        accepted = self.accept(tree, logits, session)
        self.store.commit(accepted.nodes, accepted.count)
        self.drop_finished(session)
        self.stats.seconds_draft += drafted - begun
        self.stats.seconds_forward += done - drafted
        self.stats.seconds_verify += time.perf_counter() - done

    def budget(self, i: int) -> int:
        return 1 if self.finished[i] else self.max_nodes

    def forward(self, tokens: Tensor, positions: Tensor, tree_mask: Tensor | None, wanted: list[int] | None) -> Tensor:
        """Logits [B, T or len(wanted), V]; the new keys and values are in the store, uncommitted."""
        self.store.reserve(tokens.shape[1])
        plan = AttentionPlan(self.store.seq_lens, tree_mask)
        keep: dict[str, Any] = {}
        if wanted is not None and self.model._supports_logits_to_keep():
            keep["logits_to_keep"] = torch.tensor(wanted)
        logits = self.model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=self.store,
            use_cache=True,
            branchwise_plan=plan,
            **keep,
        ).logits
        if plan.calls == 0:
            raise ValueError(
                f"{type(self.model).__name__} never called the registered attention function; it is not supported"
            )
        self.stats.forwards += 1
        self.stats.row_forwards += len(self.rows) - sum(self.finished)
        return logits[:, wanted] if wanted is not None and not keep else logits

    def accept(self, tree: TokenTree, logits: Tensor, session: Any) -> Accepted:
        """Applies the rule and emits; the counts come back cut where a row ended inside its accepted run."""
        target = Target(
            logits,
            [self.texts[row] for row in self.rows],
            [self.lengths[row] for row in self.rows],
            [self.processors[row] for row in self.rows],
            fuse_temperature=self.rule is not GREEDY,
        )
        accepted = self.rule(tree, target, self.uniforms(tree))
        emitted: list[list[int]] = []
        for i, row in enumerate(self.rows):
            if self.finished[i]:
                accepted.count[i] = 0
                emitted.append([])
                continue
            path = accepted.path(i)
            drafted = len(path) - 1
            tokens = self.emit(i, accepted.tokens(tree, i))
            emitted.append(tokens)
            # The last token's KV is not in the store, whether it was drafted or not: it is the next root.
            accepted.count[i] = len(tokens)
            if self.keep_scores:
                self.scores[row] += target.path_scores(i, path)[: len(tokens)]
            if self.sizer is not None:
                self.sizer.observe(tree.rows[i], path)
            self.stats.drafted += len(tree.rows[i]) - 1
            self.stats.accepted += min(drafted, len(tokens))
            self.stats.emitted += len(tokens)
            self.stats.accepted_flags[row] += [j < drafted for j in range(len(tokens))]
        session.observe(emitted)
        return accepted

    def uniforms(self, tree: TokenTree) -> Tensor:
        """Noise of the rule, f32[B, T, 2]."""
        lengths = torch.tensor([self.lengths[row] - self.padding[row] for row in self.rows])
        if self.rule.by_position:
            return self.noise.at_positions(lengths[:, None] + tree.positions - tree.positions[:, :1])
        return self.noise.at_nodes(lengths, tree.shape[1], Purpose.VERIFY)

    def emit(self, i: int, tokens: list[int]) -> list[int]:
        """Appends tokens to a row's text until one of them ends it; returns those that were said."""
        row = self.rows[i]
        for said, token in enumerate(tokens, start=1):
            self.texts[row][0, self.lengths[row]] = token
            self.lengths[row] += 1
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            text = self.texts[row][:, : self.lengths[row]]
            if self.lengths[row] >= self.max_length or (self.stopping and bool(self.stopping(text, None).all())):
                self.finished[i] = True
                return tokens[:said]
        return tokens

    def drop_finished(self, session: Any) -> None:
        if self.keep_finished or not any(self.finished):
            return
        kept = [i for i, done in enumerate(self.finished) if not done]
        if kept:
            self.store.select_rows(kept)
            session.keep(kept)
            self.noise.keep(kept)
        self.rows = [self.rows[i] for i in kept]
        self.finished = [False] * len(kept)

    def result(self) -> Tensor | TreeSpeculationOutput:
        pad = getattr(self.config, "_pad_token_tensor", None)
        texts = [text[0, :length] for text, length in zip(self.texts, self.lengths, strict=True)]
        sequences = pad_and_stack(texts, 0 if pad is None else int(pad.flatten()[0]))
        if not self.config.return_dict_in_generate:
            return sequences
        raw, processed = self.score_steps() if self.keep_scores else ((), ())
        return TreeSpeculationOutput(
            sequences=sequences,
            scores=processed if self.config.output_scores else None,
            logits=raw if self.config.output_logits else None,
            past_key_values=self.store,
            stats=self.stats,
        )

    def score_steps(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Raw and processed scores per step, each [B, V]; zero after the end of a row."""
        steps = max(len(row) for row in self.scores)
        zero = torch.zeros_like(self.scores[0][0][0])
        raw, processed = (
            tuple(torch.cat([row[t][kind] if t < len(row) else zero for row in self.scores]) for t in range(steps))
            for kind in (0, 1)
        )
        return raw, processed
