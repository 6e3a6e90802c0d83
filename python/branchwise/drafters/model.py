"""A small model drafts for a large one: trees from its logits, over a KV store of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import check_supported, pack_mask, use_attention
from ..cache import KVStore
from ..forward import StoredModel
from ..noise import Purpose
from ..tree import DrawKind, RowTree
from .base import DraftRequest, Needs, Verified
from .growth import grow_best_first, grow_chain, grow_shape
from .ranks import RankChances

_PADDING = 1024  # vocabularies are padded to round sizes, which differ between the models of one family


class Model:
    """Trees of what a draft model would say (cards fspad, "EAGLE-2 dynamic tree", and tree-verify, "Sequoia").

    Greedy decoding takes the draft model's likeliest tokens. With ``draws="without_replacement"``, sampling draws
    siblings one after another without replacement, from the draft model's logits under the user's temperature, top-k,
    top-p and the like, in a shape that is fixed beforehand; the verification rules for drawn drafts then accept more.

    That shape follows the acceptance measured so far, so a seed repeats a drawn text only with the same history.

    Every token is computed once: what is accepted stays in the draft model's KV store, what is rejected leaves it.
    Thread-safe if the draft model's forward is.

    Args:
        model: a supported model with the target's tokenizer; its size should be a tenth of the target's or less.
        width: paths that are followed per level, and children per node; 1 drafts chains.
        depth: most levels.
        growth: "best_first" (EAGLE-2) or "static", Sequoia's shape for the acceptance measured so far. Drawn trees
            are always static: choosing among drawn tokens would bias the text.
        draws: "deterministic" or "without_replacement", see above; for sampling only.
        min_score: growth stops where the paths in hand are together less likely than this.

    Raises:
        ValueError: an option outside its range, an unsupported model; and on use, another vocabulary than the target's.
            For a model with another tokenizer, see :meth:`branchwise.drafters.Candidates.translated`.
    """

    needs = Needs.NOTHING

    def __init__(
        self,
        model: PreTrainedModel,
        width: int = 4,
        depth: int = 6,
        growth: Literal["best_first", "static"] = "best_first",
        draws: Literal["deterministic", "without_replacement"] = "deterministic",
        min_score: float = 0.1,
    ) -> None:
        if width < 1 or depth < 1:
            raise ValueError(f"width and depth must be at least 1, got {width} and {depth}")
        if growth not in ("best_first", "static"):
            raise ValueError(f"growth must be 'best_first' or 'static', got {growth!r}")
        if draws not in ("deterministic", "without_replacement"):
            raise ValueError(f"draws must be 'deterministic' or 'without_replacement', got {draws!r}")
        check_supported(model)
        self.model, self.width, self.depth, self.min_score = model, width, depth, min_score
        self.growth, self.draws = growth, DrawKind(draws)
        self.ranks = RankChances(width)

    def begin(self, request: DraftRequest) -> ModelSession:
        if request.target is not None:
            ours, theirs = (m.config.get_text_config().vocab_size for m in (self.model, request.target))
            if abs(ours - theirs) > _PADDING:
                raise ValueError(
                    f"the draft model must have the target's tokenizer; their vocabularies have {ours} and {theirs} "
                    "tokens. Candidates.translated drafts with another tokenizer"
                )
        return ModelSession(self, request)

    def open(self, request: DraftRequest) -> StoredModel:
        """Where the draft model reads the rows; may hold all but the last tokens of them already."""
        return StoredModel(self.model, KVStore(len(request.prompts), max(map(len, request.prompts)) + 256))


class Confident(Model):
    """A chain of a draft model's likeliest tokens that ends where the model is not sure, or would end the text (card
    bild, "Small phase").

    Args:
        model: as for :class:`Model`.
        confidence: the least probability of a token that is drafted; above 1 nothing is.
        depth: most tokens.

    Raises:
        ValueError: as :class:`Model`; a negative confidence.
    """

    def __init__(self, model: PreTrainedModel, confidence: float = 0.6, depth: int = 10) -> None:
        super().__init__(model, width=1, depth=depth)
        if confidence < 0:
            raise ValueError(f"confidence must be at least 0, got {confidence}")
        self.confidence = confidence


class ModelSession:
    """Implements :class:`branchwise.drafters.growth.Expander` for the rows of a batch."""

    def __init__(self, options: Model, request: DraftRequest) -> None:
        self._options, self._noise, self._warpers = options, request.noise, request.warpers
        self._drawing = request.sampling and options.draws is not DrawKind.DETERMINISTIC
        target = options.model if request.target is None else request.target
        self._vocabulary = target.config.get_text_config().vocab_size
        self._eos = torch.tensor(sorted(request.eos), dtype=torch.int64)
        self._draft = options.open(request)
        held = self._draft.store.seq_lens.tolist()
        # Text that the draft model has not seen yet, per row.
        self._unseen = [
            torch.from_numpy(np.asarray(prompt, np.int64))[n:] for prompt, n in zip(request.prompts, held, strict=True)
        ]
        self._lengths = [len(prompt) for prompt in request.prompts]
        self._roots = [int(prompt[-1]) for prompt in request.prompts]

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        roots = self._roots
        if max(budgets) < 2:
            return [RowTree.root(root) for root in roots]
        options, noise = self._options, self._noise
        with use_attention(options.model):
            self._root_logits = self._draft.extend(self._unseen)[:, 0]
            self._unseen = [text[:0] for text in self._unseen]
            if isinstance(options, Confident):
                return grow_chain(self, roots, budgets, self._eos, depth=options.depth, confidence=options.confidence)
            if not self._drawing and options.growth == "best_first":
                return grow_best_first(
                    self,
                    roots,
                    budgets,
                    self._eos,
                    width=options.width,
                    depth=options.depth,
                    min_score=options.min_score,
                )
            shape = options.ranks.shape(max(budgets), options.depth)
            uniforms = None
            if self._drawing:
                if noise is None:
                    raise ValueError("a drafter that draws needs the request's noise")
                lengths = torch.tensor(self._lengths)
                uniforms = noise.at_nodes(lengths, len(shape[0]), Purpose.DRAFT)[..., 1].double()
            return grow_shape(self, roots, budgets, self._eos, shape, uniforms=uniforms, warp=self._warp)

    def _warp(self, logits: Tensor) -> Tensor:
        if not self._drawing:
            return logits
        ids = torch.zeros(len(logits), 1, dtype=torch.int64)  # warpers look at the scores alone
        logits = logits.float()
        for warper in self._warpers:
            logits = warper(ids, logits)
        return logits

    def root(self) -> Tensor:
        return self._fit(self._root_logits)

    def expand(self, tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        store = self._draft.store
        positions = store.seq_lens[:, None] - 1 + depths  # the root is committed here
        pending = ancestors.shape[1] - tokens.shape[1]
        return self._fit(self._draft.forward(tokens, positions, pack_mask(ancestors), pending=pending))

    def _fit(self, logits: Tensor) -> Tensor:
        more = self._vocabulary - logits.shape[-1]
        return logits if more == 0 else torch.nn.functional.pad(logits, (0, more), value=-torch.inf)

    def observe(self, verified: Verified) -> None:
        B = len(self._unseen)
        slots = np.full((B, 1), -1, np.int32)
        known = np.zeros(B, np.int32)
        if verified.tree is not None:
            paths = [
                [] if tree.ids is None else [int(tree.ids[node]) for node in verified.path(b)[1:]]
                for b, tree in enumerate(verified.tree.rows)
            ]
            paths = [[slot for slot in path if slot >= 0] for path in paths]  # leaves were never expanded
            slots = np.full((B, max(1, *map(len, paths))), -1, np.int32)
            for b, path in enumerate(paths):
                # The last token said is the next root, and new to the draft model by convention.
                known[b] = max(0, min(len(path), len(verified.emitted[b]) - 1))
                slots[b, : known[b]] = path[: known[b]]
            self._draft.store.commit(torch.from_numpy(slots), torch.from_numpy(known))
            self._options.ranks.observe(verified.tree.rows, verified.paths)
        for b, tokens in enumerate(verified.emitted):
            new = torch.tensor(list(tokens[known[b] :]), dtype=torch.int64)
            self._unseen[b] = torch.cat([self._unseen[b], new])
            self._lengths[b] += len(tokens)
            self._roots[b] = int(tokens[-1]) if tokens else self._roots[b]

    def keep(self, rows: Sequence[int]) -> None:
        if len(rows):
            self._draft.store.select_rows(list(rows))
        for name in ("_unseen", "_lengths", "_roots"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def close(self) -> None:
        self.keep([])
