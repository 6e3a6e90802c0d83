"""Searches that a reward of partial texts guides: particle filtering, A*, early rejection (card
shared-prefix-search, D, C and E)."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .branches import Branches, Ends
from .search import Answer, Found, Reward, Search, rewards_of

_LEAST = 1e-6  # rewards are kept so far from 0 and 1


def _said(branches: Branches, rows: Sequence[int]) -> list[Tensor]:
    return [branches.said(row) for row in rows]


class ParticleFilter(Search):
    """``n`` particles write a step each, are weighed by the reward r of what they wrote so far, and are drawn anew in
    proportion to (r / (1 - r))^(1 / temperature), until all have ended (Puri et al. 2025, arXiv 2502.01618).

    With ``finished="exact"`` the particles approach, as n grows, the model's distribution times the product of those
    weights over the steps of a text.

    ``found[i].texts`` holds the particles, heaviest first, or those with the winning answer first if ``answer`` is
    given; scores are their final weights, which sum to 1. ``trace`` has the ancestors and weights of every step.

    Args:
        n: particles, and rows of every forward.
        reward: of texts so far, in [0, 1]; called once per step with the particles that wrote.
        ends: of a step, given its tokens; ``StepEnd(tokenizer)`` for blank lines.
        step_tokens: most tokens of a step.
        max_steps: after these, what there is counts as ended.
        temperature: of the weights.
        finished: what a text that has ended does when the others are drawn anew: "aside" keeps it out, "kept" has it
            take part with the weight of its last step, as the published code's two settings do; "exact" with a
            neutral weight.
        systematic: one uniform number for all draws of a step instead of one each; less variance.
        answer: of a continuation; the answer with most weight wins. None: the heaviest particle does.
        options: as :class:`Search` takes them.

    Raises:
        ValueError: as :class:`Search`; an option outside its range, a reward outside [0, 1].
    """

    def __init__(
        self,
        n: int,
        reward: Reward,
        ends: Ends,
        step_tokens: int = 256,
        max_steps: int = 40,
        temperature: float = 1.0,
        finished: Literal["aside", "kept", "exact"] = "aside",
        systematic: bool = False,
        answer: Answer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(n, **options)
        if step_tokens < 1 or max_steps < 1:
            raise ValueError(f"step_tokens and max_steps must be at least 1, got {step_tokens} and {max_steps}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if finished not in ("aside", "kept", "exact"):
            raise ValueError(f"finished must be 'aside', 'kept' or 'exact', got {finished!r}")
        self.reward, self.ends, self.step_tokens, self.max_steps = reward, ends, step_tokens, max_steps
        self.temperature, self.finished, self.systematic, self.answer = temperature, finished, systematic, answer

    def search(self, branches: Branches, root: int) -> Found:
        prompt = branches.prompt
        trace: list[dict[str, Any]] = []
        rows = branches.fork(root, self.width)
        weights = torch.zeros(self.width, dtype=torch.float64)  # logs
        for step in range(self.max_steps):
            active = [i for i, row in enumerate(rows) if row not in branches.ended]
            branches.write([rows[i] for i in active], self.width, self.ends, self.step_tokens)
            said = _said(branches, [rows[i] for i in active])
            rewards = rewards_of(self.reward, prompt, said, unit_for="ParticleFilter")
            odds = torch.tensor(rewards, dtype=torch.float64).clamp(_LEAST, 1 - _LEAST).logit()
            if self.finished == "exact":
                weights[:] = 0
            weights[active] = odds / self.temperature
            ended = all(row in branches.ended for row in rows)
            trace.append({"step": step, "weights": weights.softmax(0).tolist(), "ancestors": None})
            if ended or branches.cancelled or step == self.max_steps - 1:
                break
            among = active if self.finished == "aside" else list(range(self.width))
            chosen = self._draw(weights[among].softmax(0), branches.uniforms(step, len(among)))
            new = branches.resample([rows[i] for i in among], chosen)
            ancestors = list(range(self.width))
            for place, a, row in zip(among, chosen, new, strict=True):
                rows[place], ancestors[place] = row, among[a]
            weights = weights[ancestors]
            trace[-1]["ancestors"] = ancestors
        return self._found(branches, rows, weights.softmax(0).tolist(), trace)

    def _draw(self, weights: Tensor, uniforms: Tensor) -> list[int]:
        n = len(weights)
        ends = weights.cumsum(0)
        points = (torch.arange(n, dtype=torch.float64) + uniforms[0]) / n if self.systematic else uniforms
        return torch.searchsorted(ends, points * ends[-1], right=True).clamp(max=n - 1).tolist()

    def _found(self, branches: Branches, rows: list[int], weights: list[float], trace: list[dict[str, Any]]) -> Found:
        texts = _said(branches, rows)
        shares: dict[Hashable, float] = {}
        answers: list[Hashable] = [i if self.answer is None else self.answer(text) for i, text in enumerate(texts)]
        for answer, weight in zip(answers, weights, strict=True):
            shares[answer] = shares.get(answer, 0.0) + weight
        winner = max(shares, key=lambda answer: shares[answer])
        order = sorted(range(len(rows)), key=lambda i: (answers[i] != winner, -weights[i]))
        return Found([texts[i] for i in order], [weights[i] for i in order], trace=trace)


class AStar(Search):
    """Best-first search over steps: of all texts so far, the one with the least cost is continued by ``width`` steps,
    until the least costly one has ended (Chatziveroglou et al. 2025, arXiv 2505.13672).

    With the reward r in [0, 1] of a text so far, h = 1 - r, a step costs what h rises by, and the cost of a text is
    what its steps cost plus h. The prompt counts as r = 0. Where rewards never rise along a text, the result is the
    cheapest of all.

    ``found[i].texts`` holds the result, then what was left on the frontier, cheapest first; scores are minus the costs.
    ``trace`` has every text that was continued, with g and h.

    Args:
        width: continuations of each text, b, and rows of every forward.
        reward: of texts so far, in [0, 1].
        ends: of a step, given its tokens.
        step_tokens: most tokens of a step.
        max_expansions: texts that are continued at most; then the cheapest one is returned as it is.
        resident: frontier texts that keep the KV of their steps; others give it back, those first that were not looked
            at longest, and read their steps again when their turn comes. None: all keep it.
        options: as :class:`Search` takes them.

    Raises:
        ValueError: as :class:`Search`; an option outside its range, a reward outside [0, 1].
    """

    def __init__(
        self,
        width: int,
        reward: Reward,
        ends: Ends,
        step_tokens: int = 256,
        max_expansions: int = 64,
        resident: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(width, **options)
        for name, value in {"step_tokens": step_tokens, "max_expansions": max_expansions}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if resident is not None and resident < 0:
            raise ValueError(f"resident must be at least 0, got {resident}")
        self.reward, self.ends, self.step_tokens = reward, ends, step_tokens
        self.max_expansions, self.resident = max_expansions, resident

    def search(self, branches: Branches, root: int) -> Found:
        prompt = branches.prompt
        trace: list[dict[str, Any]] = []
        first = branches.fork(root, 1)[0]
        # (f, g, order of making, branch): of equally cheap texts the older one.
        frontier: list[tuple[float, float, int, int]] = [(1.0, 0.0, 0, first)]
        made, h_of = 1, {first: 1.0}
        while True:
            _, g, _, row = frontier[0]
            if row in branches.ended or len(trace) == self.max_expansions or branches.cancelled:
                break
            heapq.heappop(frontier)
            forks = branches.fork(row, self.width)
            branches.prune([row])
            branches.write(forks, self.width, self.ends, self.step_tokens)
            rewards = rewards_of(self.reward, prompt, _said(branches, forks), unit_for="AStar")
            before = h_of.pop(row)
            trace.append({"g": g, "h": before, "rewards": rewards})
            for fork, r in zip(forks, rewards, strict=True):
                h_of[fork] = h = 1 - r
                cost = g + max(0.0, h - before)
                heapq.heappush(frontier, (cost + h, cost, made, fork))
                made += 1
            if self.resident is not None:
                newest = sorted(frontier, key=lambda entry: -entry[2])
                for *_, old in newest[self.resident :]:
                    branches.evict(old, branches.padding + len(prompt) - 1)
        order = sorted(frontier)
        return Found(_said(branches, [row for *_, row in order]), [-f for f, *_ in order], trace=trace)


class EarlyRejection(Search):
    """Beams over steps, most of which are given up in the middle of a step: ``n`` beams write ``tau`` tokens, the
    reward judges these partial steps, the best n / width complete them and are continued ``width`` times each
    (arXiv 2508.01969).

    ``found[i].texts`` holds the final beams, best first, with their rewards. ``trace`` has the rewards of every step
    and which beams were kept.

    Args:
        n: beams, and rows of the forwards that write the first tokens of a step.
        reward: of texts so far, whole or partial.
        ends: of a step, given its tokens.
        beam_width: M, a divisor of n; n / M beams survive.
        tau: tokens by which a step is judged.
        step_tokens: most tokens of a step.
        max_steps: after these, the best beam is returned as it is.
        options: as :class:`Search` takes them.

    Raises:
        ValueError: as :class:`Search`; an option outside its range.
    """

    def __init__(
        self,
        n: int,
        reward: Reward,
        ends: Ends,
        beam_width: int = 4,
        tau: int = 64,
        step_tokens: int = 256,
        max_steps: int = 40,
        **options: Any,
    ) -> None:
        super().__init__(n, **options)
        if beam_width < 1 or n % beam_width:
            raise ValueError(f"beam_width must divide n = {n}, got {beam_width}")
        if not 1 <= tau <= step_tokens:
            raise ValueError(f"tau must lie between 1 and step_tokens = {step_tokens}, got {tau}")
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        self.reward, self.ends, self.beam_width = reward, ends, beam_width
        self.tau, self.step_tokens, self.max_steps = tau, step_tokens, max_steps

    def search(self, branches: Branches, root: int) -> Found:
        prompt = branches.prompt
        trace: list[dict[str, Any]] = []
        rows = branches.fork(root, self.width)
        survivors = self.width // self.beam_width
        for step in range(self.max_steps):
            begun = {row: len(branches.texts[row]) for row in rows}
            branches.write(rows, self.width, self.ends, self.tau)
            rewards = rewards_of(self.reward, prompt, _said(branches, rows))
            order = sorted(range(len(rows)), key=lambda i: -rewards[i])[:survivors]
            trace.append({"step": step, "rewards": rewards, "kept": order})
            kept = [rows[i] for i in order]
            branches.prune([row for row in rows if row not in kept])
            # Those whose step is over already have nothing to complete.
            whole = {row for row in kept if self.ends(branches.texts[row][begun[row] :])}
            rest = [row for row in kept if row not in whole]
            # As many tokens as are left of a step, for all alike: they wrote tau each.
            if self.step_tokens > self.tau:
                branches.write(rest, survivors, self.ends, self.step_tokens - self.tau, begun=begun)
            rows = kept
            if branches.cancelled or step == self.max_steps - 1 or all(row in branches.ended for row in rows):
                break
            rows = branches.resample(kept, [i for i in range(survivors) for _ in range(self.beam_width)])
        scores = rewards_of(self.reward, prompt, _said(branches, rows))
        order = sorted(range(len(rows)), key=lambda i: -scores[i])
        return Found([branches.said(rows[i]) for i in order], [scores[i] for i in order], trace=trace)
