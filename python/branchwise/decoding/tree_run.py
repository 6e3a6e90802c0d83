"""One ``generate`` call of tree speculation: propose, verify, commit, until every row has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ..acceptance import GREEDY, Accepted, Rule
from ..cache import KVStore
from ..drafters import Drafter, DraftRequest, DraftSession, Needs, Verified
from ..forward import StoredModel
from ..kv import KVSession, policy_of
from ..noise import Noise, Purpose
from ..target import Target, ignores_text
from ..tree import DrawKind, RowTree, TokenTree
from .proposals import check_proposals
from .request import pad_and_stack
from .stats import DecodeStats
from .tree_size import CostModel, TreeSizer


@dataclass
class TreeSpeculationOutput(GenerateDecoderOnlyOutput):
    """What plain ``generate`` returns with ``return_dict_in_generate``, and ``stats``; the cache is a KVStore."""

    stats: DecodeStats | None = None


class TreeRun:
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
        cost: CostModel,
        sizer: TreeSizer | None,
    ) -> None:
        self.model, self.config, self.rule, self.processors, self.noise = model, config, rule, processors, noise
        self.stopping, self.streamer, self.max_nodes = stopping, streamer, max_nodes
        self.cost, self.sizer = cost, sizer
        self.stats = DecodeStats(rule=rule.name, exact=rule.exact)
        self.keep_finished = bool(config.return_dict_in_generate)  # the returned cache must hold every row
        self.keep_scores = self.keep_finished and bool(config.output_scores or config.output_logits)

    def decode(self, drafter: Drafter, input_ids: Tensor, prompts: list[Tensor]) -> Tensor | TreeSpeculationOutput:
        B, length = input_ids.shape
        sampling = bool(self.config.do_sample)
        self.draws = drafter.draws if sampling else DrawKind.DETERMINISTIC
        self.needs = drafter.needs
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

        new_tokens = max(self.max_length - length, 1)
        capacity = max(len(prompt) for prompt in prompts) + min(new_tokens, 512) + self.max_nodes
        store = KVStore(B, capacity)
        policy = policy_of(self.model)
        self.kv = KVSession(self.model, store) if policy is None else policy.begin(self.model, store)
        self.target = StoredModel(
            self.model,
            store,
            keep_hidden=bool(self.needs & Needs.HIDDEN_STATES),
            kv=None if policy is None else self.kv,
        )
        eos = getattr(self.config, "_eos_token_tensor", None)  # set by generate
        request = DraftRequest(
            prompts=[prompt.numpy().astype(np.int32) for prompt in prompts],
            eos=frozenset() if eos is None else frozenset(eos.flatten().tolist()),
            noise=self.noise,
            sampling=sampling,
            warpers=[processor for processor in self.processors[0] if ignores_text(processor)],
            target=self.model,
            # What the store holds under a policy is the policy's business.
            store=store if policy is None else None,
        )
        try:
            session = drafter.begin(request)
            try:
                self.prefill(prompts, session)
                while self.rows and not all(self.finished):
                    self.round(session)
            finally:
                session.close()
        finally:
            self.kv.close()
        if self.streamer is not None:
            self.streamer.end()
        return self.result()

    def prefill(self, prompts: list[Tensor], session: DraftSession) -> None:
        """Runs the prompts, ragged and without their padding, and emits the first token of every row."""
        begun = time.perf_counter()
        logits = self.kv.prefill(self.target, prompts)
        self.stats.forwards += self.target.forwards
        self.stats.row_forwards += len(prompts) * self.target.forwards
        self.stats.seconds_prefill = time.perf_counter() - begun
        roots = TokenTree([RowTree.root(int(prompt[-1])) for prompt in prompts], self.target.store.seq_lens)
        _, verified = self.accept(roots, logits)
        session.observe(verified)
        self.drop_finished(session)

    def round(self, session: DraftSession) -> None:
        begun = time.perf_counter()
        budgets: Sequence[int] = [1 if finished else self.max_nodes for finished in self.finished]
        if self.sizer is not None:
            budgets = self.sizer.budgets(budgets)
        roots = [int(self.texts[row][0, self.lengths[row] - 1]) for row in self.rows]
        vocabulary = self.model.config.get_text_config().vocab_size
        trees = check_proposals(session.propose(budgets), budgets, roots, vocabulary, self.draws)
        # Nodes that could not be emitted before max_length are not worth a forward.
        depths = [self.max_length - self.lengths[row] - 1 for row in self.rows]
        deepest = self.kv.max_depth()
        if deepest is not None:
            depths = [min(pair) for pair in zip(depths, deepest, strict=True)]
        trees = [self.kv.trim(tree.up_to_depth(depth)) for tree, depth in zip(trees, depths, strict=True)]
        proposed = time.perf_counter()
        if self.sizer is not None:
            trees = self.sizer.choose(trees)
        tree = TokenTree(trees, self.target.store.seq_lens, self.draws)
        drafted = time.perf_counter()
        logits = self.target.forward(tree.tokens, tree.positions, None if tree.is_chain else tree.tree_mask, tree=tree)
        done = time.perf_counter()
        self.stats.forwards += 1
        self.stats.row_forwards += len(self.rows) - sum(self.finished)
        self.cost.observe(tree.tokens.numel(), done - drafted)
        accepted, verified = self.accept(tree, logits)
        verdict = time.perf_counter()
        session.observe(verified)
        observed = time.perf_counter()
        if self.sizer is not None:
            self.sizer.spend(proposed - begun + observed - verdict)
        self.target.store.commit(accepted.nodes, accepted.count)
        self.kv.committed(accepted.nodes, accepted.count)
        self.drop_finished(session)
        self.stats.seconds_draft += drafted - begun + observed - verdict
        self.stats.seconds_forward += done - drafted
        self.stats.seconds_verify += time.perf_counter() - done - (observed - verdict)

    def accept(self, tree: TokenTree, logits: Tensor) -> tuple[Accepted, Verified]:
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
        return accepted, Verified(
            emitted=emitted,
            tree=tree,
            nodes=accepted.nodes,
            count=accepted.count,
            logits=logits if self.needs & Needs.LOGITS else None,
            hidden_states=self.target.hidden_states,
        )

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

    def drop_finished(self, session: DraftSession) -> None:
        if self.keep_finished or not any(self.finished):
            return
        kept = [i for i, done in enumerate(self.finished) if not done]
        if kept:
            self.target.store.select_rows(kept)
            self.kv.keep(kept)
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
            past_key_values=self.target.store,
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
