"""The target model's verdict at the nodes of token trees, under the user's own logits processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers.generation import logits_process

from .ops.verify import Verdict
from .tree import TokenTree

Processor = Callable[[Tensor, Tensor], Tensor]  # (input_ids [n, length], scores [n, V]) -> scores [n, V]

# These look at the scores alone, row by row, so nodes of any text can be processed in one call. By exact type: a
# subclass may look at the text.
_IGNORE_TEXT = frozenset(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
    if hasattr(logits_process, name)
)


def ignores_text(processor: Processor) -> bool:
    """Known to look at the scores alone, row by row."""
    return type(processor) in _IGNORE_TEXT


def keeps_no_state(processor: Processor) -> bool:
    """Known to depend on its arguments only, so that it may see texts that are not kept in the end."""
    kind = type(processor)
    return kind.__module__ == logits_process.__name__ and kind.__name__ != "SynthIDTextWatermarkLogitsProcessor"


def refuse_broken(count: Tensor, bonus: Tensor) -> None:
    """Raises RuntimeError where ops on a GPU say that logits are no distribution, which those on the CPU refuse."""
    broken = [b for b, (n, token) in enumerate(zip(count.tolist(), bonus.tolist(), strict=True)) if n == 0 > token]
    if broken:
        raise RuntimeError(
            f"logits of row {broken[0]} must hold something above -inf, and neither NaN nor +inf, at every node that "
            "is looked at"
        )


def fused_temperature(processors: Sequence[Processor]) -> float | None:
    """The temperature, if that is all that the processors apply; None: they do something else."""
    if not processors:
        return 1.0
    only = processors[0]
    if len(processors) > 1 or type(only) is not logits_process.TemperatureLogitsWarper:
        return None
    return float(cast(logits_process.TemperatureLogitsWarper, only).temperature)


class Target:
    """Logits of a batch of trees, processed where a rule looks and nowhere else.

    Processors are called in their order. Those that ignore the text see all wanted nodes in one call; the others see
    one node at a time, with the row's text and the node's own path behind it, parents before children. A rule that
    walks down from the root makes, per row, the calls of plain decoding: one per emitted token, in text order.

    Args:
        logits: [B, T, V] of the tree's nodes.
        texts: per row, i64[1, n + T + 1]: n tokens up to and including the root, then room for a path.
        lengths: n of each row.
        processors: per row, what plain ``generate`` would apply, as many for each row; empty for none.
        fuse_temperature: where temperature is the only processing, leave it to the rule.
    """

    def __init__(
        self,
        logits: Tensor,
        texts: Sequence[Tensor],
        lengths: Sequence[int],
        processors: Sequence[Sequence[Processor]],
        fuse_temperature: bool = True,
    ) -> None:
        self.logits, self.temperature = logits, 1.0
        self._texts, self._lengths, self._processors = texts, lengths, processors
        # Read by the ops only where ready; memory that is not written is never committed.
        self.scores, self.ready = logits, None
        fused = fused_temperature(processors[0])
        if fused is not None and (fuse_temperature or not processors[0]):
            self.temperature = fused
        else:
            self.scores = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            self.ready = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)

    def decide(
        self, tree: TokenTree, verify: Callable[[Tensor, float, Tensor | None], Verdict], read_ahead: bool
    ) -> Verdict:
        """Calls ``verify(scores, temperature, ready)`` until every row has the nodes that it asks for. Logits that are
        no distribution are a RuntimeError.

        ``read_ahead``: what is below a wanted node is wanted, too: first children only, and no leaves.
        """
        while True:
            accepted, count, bonus = verify(self.scores, self.temperature, self.ready)
            verdict = accepted.cpu(), count.cpu(), bonus.cpu()
            refuse_broken(verdict[1], verdict[2])
            rows = torch.nonzero(verdict[1] == 0).flatten().tolist()
            if self.ready is None or not rows:
                return verdict
            wanted = []
            for row in rows:
                node = int(verdict[2][row])
                wanted.append((row, node))
                while read_ahead and (node := int(tree.next_token[row, node])) >= 0 and tree.next_token[row, node] >= 0:
                    wanted.append((row, node))
            self._process(tree, wanted)

    def _process(self, tree: TokenTree, wanted: Sequence[tuple[int, int]]) -> None:
        rows, nodes = (torch.tensor(x) for x in zip(*wanted, strict=True))
        scores = self.logits[rows, nodes].float()
        for processors in zip(*(self._processors[row] for row, _ in wanted), strict=True):
            if ignores_text(processors[0]) and all(p is processors[0] for p in processors):
                scores = processors[0](tree.tokens[rows, nodes][:, None].to(scores.device), scores)
                continue
            for i, (processor, (row, node)) in enumerate(zip(processors, wanted, strict=True)):
                path = tree.rows[row].path(node)
                end = self._lengths[row] + len(path)
                self._texts[row][0, self._lengths[row] : end] = torch.tensor(path, dtype=torch.int64)
                text = self._texts[row][:, :end].to(scores.device)
                scores[i] = processor(text, scores[i : i + 1].clone())[0]
        assert self.ready is not None
        self.scores[rows, nodes] = scores
        self.ready[rows, nodes] = True

    def path_scores(self, row: int, path: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Raw and processed scores f32[1, V] at the nodes of an accepted path."""
        raw = self.logits[row, path].float()
        processed = raw / self.temperature if self.ready is None else self.scores[row, path]
        return list(zip(raw.split(1), processed.split(1), strict=True))
