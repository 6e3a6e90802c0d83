"""One ``generate`` call of tree speculation: propose, verify, commit, until every row has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ..acceptance import GREEDY, Accepted, Rule
from ..cache import CACHE_NAME, KVScales, KVStore
from ..devices import to_device, wait_for
from ..drafters import Drafter, DraftRequest, DraftSession, Needs, Verified
from ..forward import StoredModel
from ..kv import KVSession, policy_of
from ..noise import Noise
from ..target import Target, fused_temperature, ignores_text
from ..tree import DrawKind, RowTree, TokenTree
from .monitor import Monitor
from .proposals import check_proposals
from .request import Ending, pad_and_stack
from .rounds import GraphedRounds, Outcome, graphs_fit, padded_rows, padded_size
from .stats import DecodeStats
from .tree_size import CostModel, TreeSizer


@dataclass
class TreeSpeculationOutput(GenerateDecoderOnlyOutput):
    """What plain ``generate`` returns with ``return_dict_in_generate``, and ``stats``; the cache is a KVStore."""

    stats: DecodeStats | None = None


class TreeRun:
    """One ``generate`` call, or a part of one. Rows that finish leave the batch; ``rows[i]`` is the original row of
    batch index i.

    Args:
        stopping: of each row; sees the row's text alone.
        monitor: is told of every round, and may end the run after any.
        enough: asked after every round, given the tokens i64[n] that each row got and whether it has ended; True ends
            the run.
        rounds: runs the rounds on a GPU in graphs; with its store, and without a KV policy.
        deterministic: of the forwards, see :class:`branchwise.forward.StoredModel`.
        kv_scales: of a store in e4m3, where the run makes its own; None: in the model's dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        rule: Rule,
        processors: Sequence[Any],
        noise: Noise,
        stopping: Sequence[StoppingCriteriaList],
        streamer: Any,
        max_nodes: int,
        cost: CostModel,
        sizer: TreeSizer | None,
        monitor: Monitor | None = None,
        enough: Callable[[Sequence[tuple[Tensor, bool]]], bool] | None = None,
        rounds: GraphedRounds | None = None,
        deterministic: bool = False,
        kv_scales: KVScales | None = None,
    ) -> None:
        self.rounds, self.deterministic, self.kv_scales = rounds, deterministic, kv_scales
        self.model, self.config, self.rule, self.processors, self.noise = model, config, rule, processors, noise
        self.stopping = stopping
        self.streamer, self.max_nodes = streamer, max_nodes
        self.cost, self.sizer, self.monitor, self.enough = cost, sizer, monitor, enough
        self.texts: list[Tensor] = []
        self.lengths: list[int] = []
        self.stats = DecodeStats(rule=rule.name, exact=rule.exact)
        returns_cache = bool(config.return_dict_in_generate)  # which must hold every row
        self.keep_rows = returns_cache
        self.keep_scores = returns_cache and bool(config.output_scores or config.output_logits)

    def decode(
        self,
        drafter: Drafter,
        texts: Sequence[Tensor],
        padding: Sequence[int],
        longest: Sequence[int],
        store: KVStore | None = None,
    ) -> None:
        """Runs until every row has ended; the texts are in ``texts`` and ``lengths`` then.

        Args:
            texts: per row, i64[n_b] tokens, at least one behind the padding.
            padding: tokens at the front of each text that are none of its own.
            longest: where each row ends, padding included.
            store: holds the first tokens of each row already, all but the last one at most; None: a new one.
        """
        B = len(texts)
        prompts = [text[start:] for text, start in zip(texts, padding, strict=True)]
        sampling = bool(self.config.do_sample)
        self.draws = drafter.draws if sampling else DrawKind.DETERMINISTIC
        self.needs = drafter.needs
        self.padding, self.longest = padding, longest
        self.endings = [Ending(*pair) for pair in zip(self.stopping, longest, strict=True)]
        self.lengths = [len(text) for text in texts]
        self.begun = list(self.lengths)
        # As plain generate's processors and criteria see them, padding included.
        rooms = [max(pair) + self.max_nodes + 1 for pair in zip(self.longest, self.lengths, strict=True)]
        self.texts = [
            torch.nn.functional.pad(text[None], (0, room - len(text))) for text, room in zip(texts, rooms, strict=True)
        ]
        self.scores: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(B)]
        self.stats.accepted_flags = [[] for _ in range(B)]
        self.rows = list(range(B))
        self.finished = [False] * B

        if store is None:
            most = max(room - length for room, length in zip(rooms, self.lengths, strict=True))
            store = KVStore(B, max(map(len, prompts)) + min(most, 512 + self.max_nodes), self.kv_scales)
        policy = policy_of(self.model)
        if policy is not None and self.model.device.type != "cpu":
            raise ValueError(f"KV policies run on the CPU so far, and the model is on {self.model.device}")
        self.kv = KVSession(self.model, store) if policy is None else policy.begin(self.model, store)
        self.target = StoredModel(
            self.model,
            store,
            keep_hidden=bool(self.needs & Needs.HIDDEN_STATES),
            kv=None if policy is None else self.kv,
            deterministic=self.deterministic,
        )
        eos = getattr(self.config, "_eos_token_tensor", None)  # set by generate
        request = DraftRequest(
            prompts=[prompt.numpy().astype(np.int32) for prompt in prompts],
            eos=frozenset() if eos is None else frozenset(eos.flatten().tolist()),
            noise=self.noise,
            sampling=sampling,
            warpers=[processor for processor in self.processors[0] if ignores_text(processor)],
            target=self.model,
            # What the store holds under a policy is the policy's business, a tree's pages are shared, and e4m3 is not
            # what drafters append.
            store=store if policy is None and store.shared_pages is None and store.scales is None else None,
            deterministic=self.deterministic,
        )
        try:
            session = drafter.begin(request)
            if self.rounds is not None and not graphs_fit(self.model):
                self.rounds = None
            try:
                self.prefill(prompts, session)
                while self.rows and not all(self.finished) and not self.stopped():
                    self.round(session)
            finally:
                session.close()
        finally:
            self.kv.close()
        if self.streamer is not None:
            self.streamer.end()

    def stopped(self) -> bool:
        """From outside, before all rows have ended."""
        if self.monitor is not None and self.monitor.cancelled:
            return True
        if self.enough is None:
            return False
        running = {row for row, done in zip(self.rows, self.finished, strict=True) if not done}
        ends = zip(self.texts, self.begun, self.lengths, strict=True)
        return self.enough([(text[0, a:b], row not in running) for row, (text, a, b) in enumerate(ends)])

    def prefill(self, prompts: list[Tensor], session: DraftSession) -> None:
        """Runs what the store lacks of the prompts, ragged and without padding, and emits every row's first token."""
        begun = time.perf_counter()
        held = self.target.store.seq_lens.tolist()
        logits = self.kv.prefill(self.target, [prompt[n:] for prompt, n in zip(prompts, held, strict=True)])
        self.stats.forwards += self.target.forwards
        self.stats.row_forwards += len(prompts) * self.target.forwards
        self.stats.seconds_prefill = time.perf_counter() - begun
        roots = TokenTree([RowTree.root(int(prompt[-1])) for prompt in prompts], self.target.store.seq_lens)
        _, verified = self.accept(roots, Outcome(None, logits))
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
        # Nodes that could not be emitted before the row's end are not worth a forward.
        depths = [self.longest[row] - self.lengths[row] - 1 for row in self.rows]
        deepest = self.kv.max_depth()
        if deepest is not None:
            depths = [min(pair) for pair in zip(depths, deepest, strict=True)]
        trees = [self.kv.trim(tree.up_to_depth(depth)) for tree, depth in zip(trees, depths, strict=True)]
        proposed_trees, proposed = trees, time.perf_counter()
        if self.sizer is not None:
            trees = self.sizer.choose(trees)
        width = 1
        if self.rounds is not None:
            width = padded_size(max(map(len, trees)), self.max_nodes)
            # What the graph computes anyway.
            trees = [tree.first(width) for tree in proposed_trees]
        tree = TokenTree(trees, self.target.store.seq_lens, self.draws, width)
        drafted = time.perf_counter()
        if self.rounds is None:
            logits = self.target.forward(
                tree.tokens, tree.positions, None if tree.is_chain else tree.tree_mask, tree=tree
            )
            wait_for(logits)
            outcome = Outcome(None, logits)
        else:
            outcome = self.graphed(self.rounds, tree)
        done = time.perf_counter()
        self.stats.forwards += 1
        self.stats.row_forwards += len(self.rows) - sum(self.finished)
        accepted, verified = self.accept(tree, outcome)
        verdict = time.perf_counter()
        self.cost.observe(tree.tokens.numel(), verdict - drafted)
        session.observe(verified)
        observed = time.perf_counter()
        if self.sizer is not None:
            self.sizer.spend(proposed - begun + observed - verdict)
        if outcome.accepted is None:
            self.target.store.commit(accepted.nodes, accepted.count)
        else:  # has been, on the device
            self.target.store.set_lengths(self.target.store.seq_lens + accepted.count)
        self.kv.committed(accepted.nodes, accepted.count)
        self.drop_finished(session)
        self.stats.seconds_draft += drafted - begun + observed - verdict
        self.stats.seconds_forward += done - drafted
        self.stats.seconds_verify += time.perf_counter() - done - (observed - verdict)

    def graphed(self, rounds: GraphedRounds, tree: TokenTree) -> Outcome:
        """The round on a GPU, with the verdict where that needs neither processors nor the drafts' distributions."""
        temperature = fused_temperature(self.processors[0])
        decides = temperature is not None and self.draws is DrawKind.DETERMINISTIC
        running = ~torch.tensor(self.finished)
        return rounds.run(
            self.target,
            tree,
            self.noise,
            running,
            self.rule if decides else None,
            temperature or 1.0,
            keep_logits=bool(self.needs & Needs.LOGITS),
        )

    def accept(self, tree: TokenTree, outcome: Outcome) -> tuple[Accepted, Verified]:
        """Applies the rule, if that has not been done, and emits; the counts come back cut where a row ended inside its
        accepted run."""
        accepted, logits = outcome.accepted, outcome.logits
        target: Target | None = None
        if accepted is None:
            assert logits is not None
            target = Target(
                logits,
                [self.texts[row] for row in self.rows],
                [self.lengths[row] for row in self.rows],
                [self.processors[row] for row in self.rows],
                fuse_temperature=self.rule is not GREEDY,
            )
            accepted = self.rule(tree, target, self.uniforms(tree))
        emitted: list[list[int]] = [[] for _ in self.rows]
        paths = [nodes[:n] for nodes, n in zip(accepted.nodes.tolist(), accepted.count.tolist(), strict=True)]
        for i, (row, path, bonus) in enumerate(zip(self.rows, paths, accepted.bonus.tolist(), strict=True)):
            if self.finished[i]:
                continue
            drafted = len(path) - 1
            tokens = emitted[i] = self.emit(i, [*tree.rows[i].tokens[path[1:]].tolist(), bonus])
            if self.keep_scores and target is not None:
                self.scores[row] += target.path_scores(i, path)[: len(tokens)]
            if self.sizer is not None:
                self.sizer.observe(tree.rows[i], path)
            self.stats.drafted += len(tree.rows[i]) - 1
            self.stats.accepted += min(drafted, len(tokens))
            self.stats.emitted += len(tokens)
            self.stats.accepted_flags[row] += [j < drafted for j in range(len(tokens))]
        # The last token's KV is not in the store, whether it was drafted or not: it is the next root.
        accepted.count = torch.tensor([len(tokens) for tokens in emitted], dtype=torch.int32)
        if self.monitor is not None:
            self.monitor.advance(sum(map(len, emitted)))
        return accepted, Verified(
            emitted=emitted,
            tree=tree,
            nodes=accepted.nodes,
            count=accepted.count,
            logits=logits.cpu() if logits is not None and self.needs & Needs.LOGITS else None,
            hidden_states=to_device(self.target.hidden_states, torch.device("cpu")),
        )

    def uniforms(self, tree: TokenTree) -> Tensor:
        """Noise of the rule, f32[B, T, 2]."""
        lengths = torch.tensor([self.lengths[row] - self.padding[row] for row in self.rows])
        return self.rule.uniforms(self.noise, lengths, tree.positions - tree.positions[:, :1])

    def emit(self, i: int, tokens: list[int]) -> list[int]:
        """Appends tokens to a row's text until one of them ends it; returns those that were said."""
        row = self.rows[i]
        begin, text = self.lengths[row], self.texts[row]
        text[0, begin : begin + len(tokens)] = torch.tensor(tokens)
        for said, token in enumerate(tokens, start=1):
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if self.endings[row](text, begin + said, token):
                self.finished[i] = True
                tokens = tokens[:said]
                break
        self.lengths[row] += len(tokens)
        return tokens

    def drop_finished(self, session: DraftSession) -> None:
        if self.keep_rows or not any(self.finished):
            return
        kept = [i for i, done in enumerate(self.finished) if not done]
        width = len(kept)
        if kept and self.rounds is not None:
            width = padded_rows(width)  # every number of rows is another set of graphs
        idle = [i for i, done in enumerate(self.finished) if done]
        kept = sorted(kept + idle[: width - len(kept)])
        if len(kept) == len(self.rows):
            return
        if kept:
            self.target.store.select_rows(kept)
            self.kv.keep(kept)
            session.keep(kept)
            self.noise.keep(kept)
        self.rows = [self.rows[i] for i in kept]
        self.finished = [self.finished[i] for i in kept]

    def result(self, device: torch.device) -> Tensor | TreeSpeculationOutput:
        """What ``generate`` returns, on the caller's device."""
        pad = getattr(self.config, "_pad_token_tensor", None)
        texts = [text[0, :length] for text, length in zip(self.texts, self.lengths, strict=True)]
        sequences = pad_and_stack(texts, 0 if pad is None else int(pad.flatten()[0])).to(device)
        if not self.config.return_dict_in_generate:
            return sequences
        raw, processed = self.score_steps() if self.keep_scores else ((), ())
        return TreeSpeculationOutput(
            sequences=sequences,
            scores=processed if self.config.output_scores else None,
            logits=raw if self.config.output_logits else None,
            stats=self.stats,
            **{CACHE_NAME: self.target.store},
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
