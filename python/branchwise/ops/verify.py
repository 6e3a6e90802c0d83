"""Verification: which path of a token tree is kept, and the token after it. Card tree-verify, rules A to J.

Only visited nodes are read, and no distribution is stored: see csrc/cpu/residual.h.
"""

from __future__ import annotations

from inspect import cleandoc
from typing import Literal

import torch
from torch import Tensor

Verdict = tuple[Tensor, Tensor, Tensor]
SampleRule = Literal["each_child", "one_coin", "match"]
PolicyName = Literal["greedy_match", "surprisal", "probability_floor", "typical"]
SAMPLE_RULES = {"each_child": 0, "one_coin": 1, "match": 2}
POLICIES = {"greedy_match": 0, "surprisal": 1, "probability_floor": 2, "typical": 3}


# Appended to the docstring of every verification op below.
_SHARED = """\
Args of all verification ops, as far as they take them:
    tokens: i64[B, T] token of each node; the root's is not read.
    next_token, next_sibling: i32[B, T] from :func:`branchwise.ops.build_tree`. The order of siblings is the order in
        which they were drawn.
    logits: [B, T, V] fp32, bf16 or fp16, of the target model at each node, contiguous in V. Temperature is all that
        an op applies; other processing comes before, leaving -inf where a token is ruled out.
    uniforms: f32[B, T, 2] in [0, 1), independent; of a node, the first accepts or rejects, the second draws the token
        that ends the text there. See :func:`node_uniforms`.
    draft: f32[R, V] distributions that drafts were really drawn from, each summing to 1, and draft_index: i32[B, T],
        for each node with children the row of ``draft`` that they were drawn from. A child that its distribution
        cannot have drawn (probability 0, or drawn before, without replacement) is passed over with all below it.
    replacement: siblings were drawn independently (with replacement), or each from what the ones before left.
    temperature: at least 1e-30.
    ready: bool[B, T], logits of a node may be read. A row that needs another node returns ``num_accepted`` 0 and that
        node's id as ``bonus``; call again with more nodes ready and the same noise. None: all are ready.

Returns:
    accepted i32[B, T] node ids of the path, root first, padded with -1; num_accepted i32[B] >= 1, counting the
        root; bonus i64[B], the token after the last accepted node.

Raises:
    RuntimeError: a wrong shape or dtype; a link that leads backwards or out of the tree; a token outside the
        vocabulary; logits with NaN or +inf (greedy: ignored), or nothing above -inf; a draft that does not sum to 1, as
        far as it was read; an option outside its range.
"""


def node_uniforms(seeds: Tensor, rows: Tensor, rounds: Tensor, nodes: Tensor, purpose: int) -> Tensor:
    """Two uniforms per node, a function of the five arguments and nothing else, on every device (Philox4x32-10).

    Args:
        seeds: i64[B], all 64 bits count.
        rows: i64[B] which text this is; like the next three, its lower 32 bits count.
        rounds: i64[B, N], for example the position of the text's last token.
        nodes: i64[B, N].
        purpose: what the noise is for, so that two uses never share it.

    Returns:
        f32[B, N, 2], multiples of 2^-24 in [0, 1).

    Raises:
        RuntimeError: a wrong shape or dtype.
    """
    return torch.ops.branchwise.node_uniforms(seeds, rows, rounds, nodes, purpose)


def verify_greedy(
    tokens: Tensor, next_token: Tensor, next_sibling: Tensor, logits: Tensor, *, ready: Tensor | None = None
) -> Verdict:
    """Rule A: goes to the child that holds the argmax (lowest id on ties), while there is one."""
    return torch.ops.branchwise.verify_greedy(tokens, next_token, next_sibling, logits, ready)


def verify_sample(
    tokens: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    uniforms: Tensor,
    rule: SampleRule = "match",
    *,
    temperature: float = 1.0,
    threshold_single: float = 1.0,
    threshold_accumulated: float = 1.0,
    ready: Tensor | None = None,
) -> Verdict:
    """Rules E and F, which need no draft distribution: exact for children chosen without looking at the noise.

    ``match`` (F) draws from the target at every visited node and goes to the child that holds the draw.
    ``each_child`` (E) accepts child after child with what is left of the target's probability; siblings must differ.
    ``one_coin`` does so with one coin per node, and for it alone there are thresholds (J), **lossy below 1**: a child
    is also accepted where its probability reaches ``threshold_single``, and cumulative probabilities count 1 /
    ``threshold_accumulated`` fold.
    """
    if rule not in SAMPLE_RULES:
        raise ValueError(f"rule must be one of {', '.join(SAMPLE_RULES)}, got {rule!r}")
    if rule != "one_coin" and (threshold_single, threshold_accumulated) != (1.0, 1.0):
        raise ValueError(f"thresholds need rule 'one_coin', got {rule!r}")
    return torch.ops.branchwise.verify_sample(
        tokens,
        next_token,
        next_sibling,
        logits,
        uniforms,
        SAMPLE_RULES[rule],
        temperature,
        threshold_single,
        threshold_accumulated,
        ready,
    )


def verify_chain(
    tokens: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    draft: Tensor,
    draft_index: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    ready: Tensor | None = None,
) -> Verdict:
    """Rule B, speculative sampling (Leviathan et al. 2022, Chen et al. 2023): exact for a drawn chain, one child per
    node."""
    return torch.ops.branchwise.verify_chain(
        tokens, next_token, next_sibling, logits, draft, draft_index, uniforms, temperature, ready
    )


def verify_multi_draft(
    tokens: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    draft: Tensor,
    draft_index: Tensor,
    uniforms: Tensor,
    replacement: bool,
    *,
    temperature: float = 1.0,
    ready: Tensor | None = None,
) -> Verdict:
    """Rules C (with replacement: SpecInfer, Miao et al. 2023) and D (without: Sequoia, Chen et al. 2024; recursive
    rejection sampling, Jeon et al. 2024): from the root down, child after child against what is left of the target."""
    return torch.ops.branchwise.verify_multi_draft(
        tokens, next_token, next_sibling, logits, draft, draft_index, uniforms, replacement, temperature, ready
    )


def verify_block(
    tokens: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    draft: Tensor,
    draft_index: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    ready: Tensor | None = None,
) -> Verdict:
    """Rule G, block verification (Sun et al. 2024): exact for a drawn chain, and never accepts fewer than rule B."""
    return torch.ops.branchwise.verify_block(
        tokens, next_token, next_sibling, logits, draft, draft_index, uniforms, temperature, ready
    )


def verify_traversal(
    tokens: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    draft: Tensor,
    draft_index: Tensor,
    uniforms: Tensor,
    replacement: bool,
    *,
    temperature: float = 1.0,
    ready: Tensor | None = None,
) -> Verdict:
    """Rule H, traversal verification (Weng et al. 2025): from the leaves up, whole paths at once; G for trees."""
    return torch.ops.branchwise.verify_traversal(
        tokens, next_token, next_sibling, logits, draft, draft_index, uniforms, replacement, temperature, ready
    )


def verify_typical(
    tokens: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    uniforms: Tensor,
    *,
    epsilon: float = 0.09,
    alpha: float = 0.3,
    temperature: float = 1.0,
    ready: Tensor | None = None,
) -> Verdict:
    """Rule I, typical acceptance (Medusa, Cai et al. 2024): **lossy**. A node is acceptable where its probability is
    above min(epsilon, alpha e^-H), H the entropy in nats; the longest path of acceptable nodes wins, among equals the
    likeliest. The bonus is drawn from the target."""
    return torch.ops.branchwise.verify_typical(
        tokens, next_token, next_sibling, logits, uniforms, epsilon, alpha, temperature, ready
    )


def verify_policy(
    tokens: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    uniforms: Tensor,
    policy: PolicyName,
    *,
    threshold: float = 0.0,
    alpha: float = 0.3,
    top_k: int = 20,
    first_only: bool = False,
    temperature: float = 1.0,
    ready: Tensor | None = None,
) -> Verdict:
    """Tests of cascades (cards bild and rsd): **lossy**, but for ``greedy_match``. Goes to the first child that passes:

    - ``greedy_match``: it is the argmax. Equals :func:`verify_greedy`.
    - ``surprisal``: -ln p <= ``threshold`` (nats), or it is the argmax. With ``first_only``, once a token above the
      threshold turned out to be the argmax, what follows is not tested (Big Little Decoder, Kim et al. 2023).
    - ``probability_floor``: p >= ``threshold``, and among the ``top_k`` likeliest, lower ids first among equals
      (reverse speculative decoding, Kim et al. 2025).
    - ``typical``: p > min(``threshold``, ``alpha`` e^-H).

    The bonus is the argmax for the first two, a draw from the ``top_k`` likeliest for the third, from the target for
    the last.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    return torch.ops.branchwise.verify_policy(
        tokens,
        next_token,
        next_sibling,
        logits,
        uniforms,
        POLICIES[policy],
        threshold,
        alpha,
        top_k,
        first_only,
        temperature,
        ready,
    )


@torch.library.register_fake("branchwise::node_uniforms")
def _(seeds, rows, rounds, nodes, purpose):
    return rounds.new_empty(*rounds.shape, 2, dtype=torch.float32)


def _fake(tokens, next_token, *rest):
    return torch.empty_like(next_token), next_token.new_empty(tokens.shape[0]), tokens.new_empty(tokens.shape[0])


for _op in ("greedy", "sample", "chain", "multi_draft", "block", "traversal", "typical", "policy"):
    torch.library.register_fake(f"branchwise::verify_{_op}", _fake)

for _wrapper in (
    verify_greedy,
    verify_sample,
    verify_chain,
    verify_multi_draft,
    verify_block,
    verify_traversal,
    verify_typical,
    verify_policy,
):
    _wrapper.__doc__ = f"{cleandoc(_wrapper.__doc__ or '')}\n\n{_SHARED}"
