"""Acceptance rules: which path of a tree is kept, and the token after it. Card tree-verify, rules A to J.

Every rule is exact only for drafts drawn as it assumes; one that does not fit is refused. Lossy rules end in
``_lossy``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .noise import Noise, Purpose
from .ops.verify import PolicyName, SampleRule, Verdict
from .target import Processor, Target, keeps_no_state
from .tree import DrawKind, Links, TokenTree

_ALL = frozenset(DrawKind)
_DRAWN = frozenset({DrawKind.WITH_REPLACEMENT, DrawKind.WITHOUT_REPLACEMENT})


@dataclass
class Accepted:
    """Outcome of a rule for a batch.

    Attributes:
        nodes: i32[B, T] node ids of the accepted path, root first, padded with -1.
        count: i32[B] nodes in it, the root included, so at least 1.
        bonus: i64[B] the token after the last accepted node; it is the next root.
    """

    nodes: Tensor
    count: Tensor
    bonus: Tensor

    def path(self, row: int) -> list[int]:
        return self.nodes[row, : int(self.count[row])].tolist()

    def tokens(self, tree: TokenTree, row: int) -> list[int]:
        """What the row emits: accepted tokens, then the bonus."""
        return [*tree.tokens[row, self.path(row)[1:]].tolist(), int(self.bonus[row])]


# (tree, uniforms, scores, temperature, ready) -> accepted, num_accepted, bonus
_Verify = Callable[[Links, Tensor, Tensor, float, Tensor | None], Verdict]


@dataclass(frozen=True)
class Rule:
    """An acceptance rule.

    Attributes:
        exact: the emitted text has exactly the target's distribution.
        accepts: the kinds of drafts it is for.
        by_position: its noise belongs to positions of the text, not to nodes of a tree: the text depends on the seed
            alone, and equals that of :class:`branchwise.PositionKeyedSampler`.
        path_only: it looks at the nodes of the accepted path alone, in text order.
    """

    name: str
    exact: bool
    accepts: frozenset[DrawKind]
    verify: _Verify
    by_position: bool = False
    path_only: bool = True

    def __call__(self, tree: TokenTree, target: Target, uniforms: Tensor) -> Accepted:
        """``uniforms``: f32[B, T, 2], see :mod:`branchwise.ops.verify`."""
        device = target.logits.device
        there, noise = tree.links(device), uniforms.to(device)
        verdict = target.decide(
            tree,
            lambda scores, temperature, ready: self.verify(there, noise, scores, temperature, ready),
            read_ahead=not self.path_only,
        )
        return Accepted(*verdict)

    def uniforms(self, noise: Noise, lengths: Tensor, depths: Tensor) -> Tensor:
        """The noise f32[B, T, 2] of a round; nothing for the greedy rule.

        Args:
            noise: of the rows.
            lengths: i64[B], tokens of each text up to and including the root.
            depths: i64[B, T], levels below the root.
        """
        if self is GREEDY:
            return torch.empty(0, device=lengths.device)
        if self.by_position:
            return noise.at_positions(lengths[:, None] + depths)
        return noise.at_nodes(lengths, depths.shape[1], Purpose.VERIFY)


def _greedy(tree: Links, u: Tensor, scores: Tensor, temperature: float, ready: Tensor | None) -> Verdict:
    return ops.verify_greedy(*tree.walk, scores, ready=ready)


def _sample(rule: SampleRule, single: float = 1.0, accumulated: float = 1.0) -> _Verify:
    def verify(tree: Links, u: Tensor, scores: Tensor, temperature: float, ready: Tensor | None) -> Verdict:
        return ops.verify_sample(
            *tree.walk,
            scores,
            u,
            rule,
            temperature=temperature,
            threshold_single=single,
            threshold_accumulated=accumulated,
            ready=ready,
        )

    return verify


def _against_draft(op: Callable[..., Verdict], says_replacement: bool) -> _Verify:
    def verify(tree: Links, u: Tensor, scores: Tensor, temperature: float, ready: Tensor | None) -> Verdict:
        if tree.draft is None:  # nothing was drafted in any row: a root alone
            return ops.verify_sample(*tree.walk, scores, u, temperature=temperature, ready=ready)
        how = (tree.draws is DrawKind.WITH_REPLACEMENT,) if says_replacement else ()
        return op(*tree.walk, scores, tree.draft, tree.draft_index, u, *how, temperature=temperature, ready=ready)

    return verify


#: Rule A: the argmax after every node; equals greedy decoding for any tree.
GREEDY = Rule("greedy", True, _ALL, _greedy)
#: Rule F: draws from the target at every visited node and goes to the child that holds the draw.
SAMPLE_AND_MATCH = Rule("sample_and_match", True, _ALL, _sample("match"), by_position=True)
#: Rule E: accepts child after child with what is left of the target's probability.
EACH_CHILD = Rule("each_child", True, _ALL, _sample("each_child"))
#: Rule E with one coin per node.
ONE_COIN = Rule("one_coin", True, _ALL, _sample("one_coin"))
#: Rule B, speculative sampling: chains only.
CHAIN = Rule("chain", True, _DRAWN, _against_draft(ops.verify_chain, False))
#: Rules C and D, by how the children were drawn.
MULTI_DRAFT = Rule("multi_draft", True, _DRAWN, _against_draft(ops.verify_multi_draft, True))
#: Rule G, block verification: chains only.
BLOCK = Rule("block", True, _DRAWN, _against_draft(ops.verify_block, False), path_only=False)
#: Rule H, traversal verification: of the exact rules for drawn children the one that accepts most.
TRAVERSAL = Rule("traversal", True, _DRAWN, _against_draft(ops.verify_traversal, True), path_only=False)


def typical_lossy(epsilon: float = 0.09, alpha: float = 0.3) -> Rule:
    """Rule I, typical acceptance, **lossy**: see :func:`branchwise.ops.verify_typical`."""

    def verify(tree: Links, u: Tensor, scores: Tensor, temperature: float, ready: Tensor | None) -> Verdict:
        return ops.verify_typical(
            *tree.walk, scores, u, epsilon=epsilon, alpha=alpha, temperature=temperature, ready=ready
        )

    return Rule("typical_lossy", False, _ALL, verify, path_only=False)


def thresholds_lossy(single: float = 1.0, accumulated: float = 1.0) -> Rule:
    """Rule J, **lossy** where a threshold is below 1: see ``one_coin`` of :func:`branchwise.ops.verify_sample`."""
    return Rule("thresholds_lossy", False, _ALL, _sample("one_coin", single, accumulated))


def policy_lossy(
    policy: PolicyName, threshold: float = 0.0, alpha: float = 0.3, top_k: int = 20, first_only: bool = False
) -> Rule:
    """A cascade's test, **lossy**: see :func:`branchwise.ops.verify_policy`."""

    def verify(tree: Links, u: Tensor, scores: Tensor, temperature: float, ready: Tensor | None) -> Verdict:
        return ops.verify_policy(
            *tree.walk,
            scores,
            u,
            policy,
            threshold=threshold,
            alpha=alpha,
            top_k=top_k,
            first_only=first_only,
            temperature=temperature,
            ready=ready,
        )

    return Rule(f"{policy}_lossy", False, _ALL, verify)


_EXACT = (GREEDY, SAMPLE_AND_MATCH, EACH_CHILD, ONE_COIN, CHAIN, MULTI_DRAFT, BLOCK, TRAVERSAL)
RULES = {rule.name: rule for rule in (*_EXACT, typical_lossy())}


def choose_rule(
    rule: str | Rule | None, draws: DrawKind, sampling: bool, processors: Sequence[Sequence[Processor]]
) -> Rule:
    """The rule of a call.

    Args:
        rule: a rule, its name, or None for the exact one that accepts most: sample-and-match for deterministic drafts,
            traversal for drawn ones, or multi-draft where a processor may keep state, as it must not see texts that
            are dropped.
        draws: how the drafter draws.
        sampling: False makes every exact rule greedy, which is what they are at temperature 0.
        processors: per row.

    Raises:
        ValueError: an unknown rule; one that is not for such drafts; greedy when sampling; a rule that looks beside the
            accepted path, with processors that may keep state.
    """
    stateless = all(keeps_no_state(p) for row in processors for p in row)
    if rule is None:
        drawn = TRAVERSAL if stateless else MULTI_DRAFT
        rule = SAMPLE_AND_MATCH if draws is DrawKind.DETERMINISTIC else drawn
    elif isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule must be a Rule or one of {', '.join(RULES)}, got {rule!r}")
        rule = RULES[rule]
    if draws not in rule.accepts:
        raise ValueError(f"rule {rule.name} is not for drafts drawn {draws.value}; leave the choice to rule=None")
    if rule.exact and not sampling:
        return GREEDY
    if rule is GREEDY:
        raise ValueError("rule must not be greedy when do_sample=True")
    if not rule.path_only and not stateless:
        raise ValueError(
            f"rule {rule.name} looks at texts that may be dropped, so logits processors must not keep state; of yours "
            "that is only known of transformers' own"
        )
    return rule
