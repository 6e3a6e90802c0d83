"""How good is a step? Scorers of :class:`branchwise.StepSpeculative`, and rules that end thinking early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_JUDGE = (
    "\n\nRate the quality of the last reasoning step from 0 (wrong or useless) to 9 (right and helpful). "
    "Answer with one digit.\nThe quality score is: "
)


class Scorer(Protocol):
    """What a scorer is; any function (context i64[n], step i64[m]) -> float will do in its place.

    Attributes:
        suffix: i64[k] tokens that the base model reads behind the step; they do not become text.
    """

    suffix: Tensor

    def __call__(self, step: Tensor, logits: Tensor) -> float:
        """The score of i64[m] tokens, given the base model's logits [m + 1 + k, V] from the last token of the context
        on to the end of the suffix."""
        ...


class JudgeScore:
    """The base model's own mark, a digit from 0 to 9 behind a prompt that asks for it (card specreason, 3 and 4).

    Args:
        tokenizer: of the base model; digits must be single tokens.
        suffix: what follows the step. For chat models: the end of the assistant's turn, a user's turn that asks for a
            mark, and the begin of an answer, in the model's own template. It follows the text as it is, so a template
            that rewrites earlier turns does not fit.
        average: the mean digit under the model, instead of the likeliest token, which counts 0 if it is no digit.
        top: of the likeliest tokens, so many count for the average.

    Raises:
        ValueError: a digit is not a single token, or the suffix has no token.
    """

    def __init__(self, tokenizer: object, suffix: str = _JUDGE, average: bool = False, top: int = 10) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]

        self.suffix = torch.tensor(encode(suffix), dtype=torch.int64)
        if len(self.suffix) == 0:
            raise ValueError(f"suffix must have at least one token, got {suffix!r}")
        digits = [encode(str(digit)) for digit in range(10)]
        if any(len(ids) != 1 for ids in digits):
            raise ValueError(f"digits must be single tokens of the tokenizer, got {digits}")
        self.digits = torch.tensor([ids[0] for ids in digits])
        self.average, self.top = average, top

    def __call__(self, step: Tensor, logits: Tensor) -> float:
        best = logits[-1].float().topk(min(self.top, logits.shape[-1]))
        if not self.average:
            found = (self.digits == best.indices[0]).nonzero()
            return float(found[0]) if len(found) else 0.0
        p = logits[-1].float().softmax(-1)[self.digits]
        p = torch.where(torch.isin(self.digits, best.indices), p, 0)
        return float((p * torch.arange(10)).sum() / p.sum()) if float(p.sum()) > 0 else 0.0


class LogProbabilityScore:
    """The base model's mean log-probability of the step's tokens, in nats: it costs nothing beyond reading them."""

    def __init__(self) -> None:
        self.suffix = torch.empty(0, dtype=torch.int64)

    def __call__(self, step: Tensor, logits: Tensor) -> float:
        if len(step) == 0:
            return 0.0
        log_p = logits[: len(step)].float().log_softmax(-1)
        return float(log_p.gather(1, step[:, None]).mean())


StopRule = Callable[[Sequence[Tensor]], bool]  # of the accepted steps so far, the last one new


def repeated_step(steps: Sequence[Tensor]) -> bool:
    """The last step is, token for token, an earlier one."""
    return any(torch.equal(steps[-1], other) for other in steps[:-1])


class AnswerFound:
    """The last step contains one of these strings, such as "\\\\boxed".

    Args:
        tokenizer: anything with ``decode``.
        markers: strings.
    """

    def __init__(self, tokenizer: object, markers: Sequence[str]) -> None:
        if not markers or not all(markers):
            raise ValueError(f"markers must be strings that are not empty, got {list(markers)}")
        self._decode, self._markers = tokenizer.decode, list(markers)  # type: ignore[attr-defined]

    def __call__(self, steps: Sequence[Tensor]) -> bool:
        text = self._decode(steps[-1].tolist())
        return any(marker in text for marker in self._markers)
