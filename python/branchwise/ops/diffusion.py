"""What decoders of masked-diffusion models ask of logits, and the steps they take. Cards freedave, dllm-baselines."""

import math

import torch
from torch import Tensor

from ._load import refuse_grad

SCORES = ("probability", "margin", "entropy")
RULES = ("count", "threshold", "budget")


def confidence(
    logits: Tensor,
    exclude: Tensor | None = None,
    temperature: float = 0.0,
    keys: Tensor | None = None,
    score: str = "probability",
) -> tuple[Tensor, Tensor]:
    """The token of every row and how sure the model is of it, in one read of the logits.

    Args:
        logits: [R, V] float32, bfloat16 or float16, contiguous in V.
        exclude: i64[E] tokens that are never said and take no part in any probability: the mask, as a rule.
        temperature: 0 takes the likeliest token, of equals the lowest. Otherwise the token is drawn from the softmax
            of ``logits / temperature`` by Gumbel noise, which is a function of the row's key and the token: equal keys
            and logits give equal tokens.
        keys: i64[R], needed with a temperature.
        score: "probability" of the token; "margin" between the two largest probabilities; or "entropy", the negative
            entropy in nats, so that larger is surer here, too. All of the softmax of the logits as they are.

    Returns:
        ``tokens`` i64[R] and ``scores`` f32[R]; -1 and -inf for a row that holds NaN or infinity, or no token.

    Raises:
        RuntimeError: a wrong shape or dtype, a negative temperature, or one without keys.
        ValueError: an unknown score.

    Source: card freedave, kernel 2; card dllm-baselines.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    refuse_grad("confidence", logits)
    return torch.ops.branchwise.confidence.default(logits, exclude, temperature, keys, SCORES.index(score))


@torch.library.register_fake("branchwise::confidence")
def _(logits, exclude=None, temperature=0.0, keys=None, score=0):
    R = logits.shape[0]
    return logits.new_empty(R, dtype=torch.int64), logits.new_empty(R, dtype=torch.float32)


def confidence_reference(logits, exclude=None, temperature=0.0, noise=None, score="probability"):
    """The definition of :func:`confidence` in float64; ``noise``: f64[R, V] Gumbel noise in place of keys."""
    x = logits.double()
    odd = (x.isnan() | x.isposinf()).any(-1)
    if exclude is not None:
        x = x.index_fill(-1, exclude, -math.inf)
    p = x.softmax(-1)
    tokens = (x if temperature == 0 else x / temperature + noise).max(-1).indices
    if score == "probability":
        scores = p.gather(-1, tokens[:, None])[:, 0]
    elif score == "margin":
        top = torch.nn.functional.pad(p, (0, 2)).topk(2, -1).values
        scores = top[:, 0] - top[:, 1]
    else:
        scores = torch.special.xlogy(p, p).sum(-1)
    nothing = odd | (x == -math.inf).all(-1)
    return torch.where(nothing, -1, tokens), torch.where(nothing, -math.inf, scores)


def draft_blocks(
    window: Tensor,
    tokens: Tensor,
    scores: Tensor,
    origins: Tensor,
    counts: Tensor,
    mask_id: int,
    block_size: int,
    rule: str = "count",
    level: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The next states of windows, all from the predictions at hand: the first is certain, the others are guesses.

    A step takes place in the first block that has masks. It unmasks positions in the order of their scores, of equals
    the lower one first: by the rule "count" as many as ``counts`` says, by "threshold" all with a score of at least
    ``level``, by "budget" as long as the sum of negative scores (entropies) is at most ``level``; always at least one.
    Under the latter two, drafts after the first add one position each.

    Args:
        window: i64[B, W] tokens.
        tokens, scores: i64[B, W] and f32[B, W] predictions; a masked position whose score is -inf has none.
        origins: i32[B], where in its window a row's first block begins; what lies before is one block of its own.
        counts: i32[B, K + 1]; column k is the count of step k, the last one is only :func:`verify_blocks`'s.
        mask_id, block_size, rule, level: see above.

    Returns:
        ``drafts`` i64[B, K, W] and ``num_drafts`` i32[B]: a row has fewer than K where masks or predictions run out;
        what lies behind repeats the last.

    Raises:
        RuntimeError: a wrong shape or dtype, or ``block_size`` below 1.
        ValueError: an unknown rule.

    Source: card freedave, algorithm, step 4a.
    """
    return torch.ops.branchwise.draft_blocks.default(
        window, tokens, scores, origins, counts, mask_id, block_size, _rule(rule), level
    )


@torch.library.register_fake("branchwise::draft_blocks")
def _(window, tokens, scores, origins, counts, mask_id, block_size, rule=0, level=0.0):
    B, W = window.shape
    return window.new_empty(B, counts.shape[1] - 1, W), origins.new_empty(B)


def verify_blocks(
    drafts: Tensor,
    num_drafts: Tensor,
    tokens: Tensor,
    scores: Tensor,
    origins: Tensor,
    counts: Tensor,
    mask_id: int,
    block_size: int,
    rule: str = "count",
    level: float = 0.0,
) -> Tensor:
    """How far drafts agree with the steps that the model takes from them.

    Draft 0 is right. Where the step from a right draft, by the predictions there, gives another draft, that one is
    right, too; of several equal ones the last. Arguments as for :func:`draft_blocks`, but ``tokens`` and ``scores`` are
    [B, K, W], the predictions at each draft.

    Returns:
        i32[B], the last right draft; -1 for a row without drafts.

    Source: card freedave, algorithm, steps 4c to 4e (rule "exact").
    """
    return torch.ops.branchwise.verify_blocks.default(
        drafts, num_drafts, tokens, scores, origins, counts, mask_id, block_size, _rule(rule), level
    )


@torch.library.register_fake("branchwise::verify_blocks")
def _(drafts, num_drafts, tokens, scores, origins, counts, mask_id, block_size, rule=0, level=0.0):
    return num_drafts.new_empty(num_drafts.shape)


def _rule(rule: str) -> int:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    return RULES.index(rule)


def step_reference(window, tokens, scores, origin, count, mask_id, block_size, rule, level, single=False):
    """One step of one window, lists in and out; None where masks lack a prediction or there are none."""

    def block(i):
        return -1 if i < origin else (i - origin) // block_size

    masked = [i for i, token in enumerate(window) if token == mask_id]
    here = [i for i in masked if block(i) == block(masked[0])]
    if not here or any(not scores[i] > -math.inf for i in here):
        return None
    here.sort(key=lambda i: (-scores[i], i))
    chosen = here[:1]
    for i in here[1:]:
        enough = {
            "count": len(chosen) >= count,
            "threshold": scores[i] < level,
            "budget": -sum(scores[j] for j in [*chosen, i]) > level,
        }[rule]
        if enough or single:
            break
        chosen.append(i)
    return [tokens[i] if i in chosen else token for i, token in enumerate(window)]


def draft_blocks_reference(window, tokens, scores, origins, counts, mask_id, block_size, rule="count", level=0.0):
    """The definition of :func:`draft_blocks`."""
    B, K = counts.shape[0], counts.shape[1] - 1
    drafts, num = window[:, None].repeat(1, K, 1), torch.zeros(B, dtype=torch.int32)
    for b in range(B):
        state = window[b].tolist()
        for k in range(K):
            after = step_reference(
                state, tokens[b].tolist(), scores[b].tolist(), int(origins[b]), int(counts[b, k]), mask_id, block_size,
                rule, level, single=k > 0 and rule != "count",
            )  # fmt: skip
            if after is None:
                break
            state, num[b] = after, k + 1
            drafts[b, k:] = torch.tensor(state)
    return drafts, num


def verify_blocks_reference(
    drafts, num_drafts, tokens, scores, origins, counts, mask_id, block_size, rule="count", level=0.0
):
    """The definition of :func:`verify_blocks`."""
    accepted = torch.full_like(num_drafts, -1)
    for b, num in enumerate(num_drafts.tolist()):
        right = -1 if num == 0 else 0
        while right >= 0:
            after = step_reference(
                drafts[b, right].tolist(), tokens[b, right].tolist(), scores[b, right].tolist(), int(origins[b]),
                int(counts[b, right + 1]), mask_id, block_size, rule, level,
            )  # fmt: skip
            equal = [j for j in range(right + 1, num) if drafts[b, j].tolist() == after]
            if not equal:
                break
            right = equal[-1]
        accepted[b] = right
    return accepted
