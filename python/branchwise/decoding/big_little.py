"""BigLittle: a small model writes until it is unsure, a large one reviews (card bild)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..acceptance import policy_lossy
from ..drafters import Confident
from .tree_run import TreeSpeculationOutput
from .tree_speculation import TreeSpeculation


class BigLittle(TreeSpeculation):
    """A ``custom_generate`` callable for the large model, **lossy** (Kim et al. 2023, arXiv 2302.07863).

    The small model appends its likeliest tokens while each has a probability of at least ``fallback``. Then the large
    one reads them in one forward; from the first token on that is too surprising to it, ``-ln p > rollback``, and not
    its own choice, they are taken back. It says the next token itself, and ends texts itself: an end that the small
    model would write is left to it. Greedy. Any batch size; rows are independent.

    With ``rollback=0`` every token is the large model's own choice: the text of plain greedy decoding.

    Args:
        little: a decoder-only model with the large one's tokenizer.
        fallback: probability below which the small model hands over; above 1 it never writes.
        rollback: nats.
        little_tokens: most tokens that the small model writes at a time.
        first_only: test as the reference code does: after a surprising token that turned out to be the large model's
            choice, the following ones of the round are not looked at.

    Raises:
        ValueError: an option outside its range, an unsupported model; when called, sampling, or another vocabulary.

    Encoder-decoder models, which the paper uses, are not supported.
    """

    def __init__(
        self,
        little: PreTrainedModel,
        fallback: float = 0.6,
        rollback: float = 5.0,
        little_tokens: int = 10,
        first_only: bool = False,
    ) -> None:
        if rollback < 0:
            raise ValueError(f"rollback must be at least 0 nats, got {rollback}")
        if not 1 <= little_tokens <= 1023:
            raise ValueError(f"little_tokens must lie between 1 and 1023, got {little_tokens}")
        super().__init__(
            Confident(little, fallback, little_tokens),
            max_nodes=little_tokens + 1,
            adaptive=False,
            rule=policy_lossy("surprisal", rollback, first_only=first_only),
        )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | TreeSpeculationOutput:
        if (generation_config or model.generation_config).do_sample:
            raise ValueError("BigLittle decodes greedily: do_sample must be False")
        return super().__call__(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, **model_kwargs
        )
