"""PromptDistill: behind an early layer, only the prompt's chosen tokens go on (card promptdistill)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVStore
from ..forward import StoredModel
from ..layers import LayerSwitch, pass_through
from .base import check_budget, check_page_size, check_range, resolve_budget, windowed_layers
from .prompt_layers import LayerwiseSession, best_positions


class PromptDistill:
    """After each selection layer, only the tokens that the prompt's last one matches best, and that one, go through the
    layers above, at their true positions (Jin et al. 2025, arXiv 2503.23274).

    Exact for prompts of at most ``budget + 1`` tokens. Layers above a selection compute and hold its tokens only; with
    ``truncate`` the layers below are cut to them when the prompt has been read, else they keep all S.

    Args:
        budgets: tokens that go on behind each selection layer, or ratios of the prompt.
        layers: the selection layers, ascending, from 0.
        truncate: how many of the stages are cut to their selection; -1: all.
        kernel: odd width of the average over positions; 1: none.
        page_size: slots allocated together per head.

    Raises:
        ValueError: an option outside its range; on use, a model without these layers, whose layers share keys, or
            with sliding windows behind a selection.
    """

    def __init__(
        self,
        budgets: Sequence[int | float] = (1024,),
        layers: Sequence[int] = (13,),
        truncate: int = 0,
        kernel: int = 1,
        page_size: int = 16,
    ) -> None:
        for budget in budgets:
            check_budget("budgets", budget)
        if len(budgets) != len(layers) or not layers or sorted(set(layers)) != list(layers) or layers[0] < 0:
            raise ValueError(f"layers must ascend and match budgets, got {list(layers)} and {list(budgets)}")
        check_range("truncate", truncate, -1, len(layers))
        check_page_size(page_size)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.budgets, self.layers, self.kernel, self.page_size = tuple(budgets), tuple(layers), kernel, page_size
        self.truncate = len(layers) if truncate < 0 else truncate

    def begin(self, model: PreTrainedModel, store: KVStore) -> PromptDistillSession:
        count = model.config.get_text_config().num_hidden_layers
        if self.layers[-1] >= count:
            raise ValueError(f"layers must be below the model's {count} layers, got {self.layers[-1]}")
        windowed = {layer for layer in windowed_layers(model) if layer > self.layers[0]}
        if windowed:
            raise ValueError(
                f"{type(model).__name__} has layers with a window of positions behind layer {self.layers[0]}, "
                f"{sorted(windowed)}, which would see tokens that lie further apart"
            )
        return PromptDistillSession(model, store, self)


class PromptDistillSession(LayerwiseSession):
    """``kept``: after each selection, positions of the prompt's tokens that went on, i64 per row."""

    def __init__(self, model: PreTrainedModel, store: KVStore, options: PromptDistill) -> None:
        super().__init__(model, store)
        self.options = options
        self.kept: list[list[Tensor]] = []

    def prefill(self, target: StoredModel, prompts: Sequence[Tensor]) -> Tensor:
        options = self.options
        full = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        budgets = [resolve_budget(budget, full) for budget in options.budgets]
        if bool((full - 1 <= torch.stack(budgets).amin(0)).all()):
            return target.extend(prompts)
        states = self.read(target, prompts, options.layers[0])
        here = [torch.arange(len(prompt)) for prompt in prompts]  # positions of the tokens in hand
        logits: Tensor | None = None
        for stage, layer in enumerate(options.layers):
            lengths = torch.tensor([len(row) for row in here], dtype=torch.int32)
            scores = self.last_products(layer, lengths)
            chosen = best_positions(scores, lengths - 1, budgets[stage], options.kernel)
            chosen = [torch.cat([row, row.new_tensor([int(n) - 1])]) for row, n in zip(chosen, lengths, strict=True)]
            here = [positions[row] for positions, row in zip(here, chosen, strict=True)]
            states = [state[row] for state, row in zip(states, chosen, strict=True)]
            self.kept.append(here)
            last = options.layers[stage + 1] if stage + 1 < len(options.layers) else -1
            tokens = [prompt[row] for prompt, row in zip(prompts, here, strict=True)]
            logits, states = self._run(target, tokens, here, states, layer + 1, last)
        assert logits is not None
        self._truncate()
        self.store.set_lengths(full)
        return logits

    def _run(
        self,
        target: StoredModel,
        tokens: list[Tensor],
        positions: list[Tensor],
        states: list[Tensor],
        first: int,
        last: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """Layers ``first`` to ``last`` (-1: all) over hidden states [n_b, H]: logits of the last token, new states."""
        counts = torch.tensor([len(row) for row in tokens], dtype=torch.int32)
        padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        at = torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)
        switch = LayerSwitch(self.model, watch=frozenset() if last < 0 else frozenset({last}))
        end = len(switch.layers) if last < 0 else last + 1
        self._watched, self._last = last, [None] * len(tokens)
        switch.replace = {layer: pass_through for layer in [*range(1, first), *range(end, len(switch.layers))]}
        switch.replace[0] = lambda hidden, kwargs: padded
        self.store.start_empty(range(first, end), self.options.page_size)
        ends = (counts - 1).tolist()
        wanted = sorted(set(ends)) if last < 0 else [0]
        try:
            out = target.forward(ids, at, wanted=wanted, prompt_ends=counts, last_chunk=True, layers=range(first, end))
        finally:
            switch.remove()
        for layer in range(first, end):
            self.store.layers[layer].advance(counts)
        if last >= 0:
            return out[:, :1], [switch.outputs[last][row, :n] for row, n in enumerate(counts.tolist())]
        rows = torch.arange(len(tokens))
        return out[rows, [wanted.index(n) for n in ends]][:, None], []

    def _truncate(self) -> None:
        """Cuts the layers of the first stages to the tokens that went on behind them."""
        first = 0
        for stage, layer in enumerate(self.options.layers[: self.options.truncate]):
            kept, before = self.kept[stage], self.kept[stage - 1] if stage else None
            rows = [
                row if before is None else torch.searchsorted(before[b], row) for b, row in enumerate(kept)
            ]  # positions as slots of these layers
            keep = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).int()[:, None].contiguous()
            counts = torch.tensor([[len(row)] for row in rows], dtype=torch.int32)
            for index in range(first, layer + 1):
                self.store.evict(index, keep, counts, self.options.page_size)
            first = layer + 1
