"""BigLittle: a small model writes until it is unsure, a large one reviews (card bild)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..acceptance import choose_rule, policy_lossy
from ..drafters import Confident
from ..tree import DrawKind
from .call import Call
from .monitor import Monitor, watch
from .request import callers, check_mode, pad_and_stack, refuse_dict
from .seq2seq import CachedDecoder, write_row
from .stats import DecodeStats
from .tree_run import TreeSpeculationOutput
from .tree_speculation import TreeSpeculation


class BigLittle(TreeSpeculation):
    """A ``custom_generate`` callable for the large model, **lossy** (Kim et al. 2023, arXiv 2302.07863).

    The small model appends its likeliest tokens while each has a probability of at least ``fallback``. Then the large
    one reads them in one forward; from the first token on that is too surprising to it, ``-ln p > rollback``, and not
    its own choice, they are taken back. It says the next token itself, and ends texts itself: an end that the small
    model would write is left to it. Greedy. Any batch size; rows are independent.

    With ``rollback=0`` every token is the large model's own choice: the text of plain greedy decoding.

    Encoder-decoders (T5, BART) work, too, if both models are; their rows are written one after another, over
    transformers' own attention and caches.

    Args:
        little: a model with the large one's tokenizer.
        fallback: probability below which the small model hands over; above 1 it never writes.
        rollback: nats.
        little_tokens: most tokens that the small model writes at a time.
        first_only: test as the reference code does: after a surprising token that turned out to be the large model's
            choice, the following ones of the round are not looked at.
        monitor: shows progress, and ends calls early; see :class:`branchwise.Monitor`.

    Raises:
        ValueError: an option outside its range, an unsupported model; when called, sampling, or another vocabulary.
    """

    def __init__(
        self,
        little: PreTrainedModel,
        fallback: float = 0.6,
        rollback: float = 5.0,
        little_tokens: int = 10,
        first_only: bool = False,
        monitor: Monitor | None = None,
    ) -> None:
        if rollback < 0:
            raise ValueError(f"rollback must be at least 0 nats, got {rollback}")
        if not 1 <= little_tokens <= 1023:
            raise ValueError(f"little_tokens must lie between 1 and 1023, got {little_tokens}")
        if fallback < 0:
            raise ValueError(f"fallback must be at least 0, got {fallback}")
        self.little, self.fallback, self.little_tokens = little, fallback, little_tokens
        super().__init__(
            "none" if little.config.is_encoder_decoder else Confident(little, fallback, little_tokens),
            max_nodes=little_tokens + 1,
            adaptive=False,
            rule=policy_lossy("surprisal", rollback, first_only=first_only),
            monitor=monitor,
        )

    def decode(self, call: Call) -> Tensor | TreeSpeculationOutput:
        if call.config.do_sample:
            raise ValueError("BigLittle decodes greedily: do_sample must be False")
        kinds = [m.config.is_encoder_decoder for m in (self.little, call.model)]
        if kinds[0] != kinds[1]:
            raise ValueError("little must be an encoder-decoder if, and only if, the large model is one")
        return self._seq2seq(call) if kinds[0] else super().decode(call)

    def _seq2seq(self, call: Call) -> Tensor:
        check_mode(call.decoder, call.config)
        refuse_dict(call.decoder, call.config)
        model, input_ids = call.model, call.input_ids
        encoder_outputs, mask = (call.model_kwargs.get(name) for name in ("encoder_outputs", "attention_mask"))
        inputs = callers("inputs_tensor")  # what the little model's encoder must read is not handed over
        if inputs is None or encoder_outputs is None:
            raise ValueError("with an encoder-decoder, BigLittle works through generate(custom_generate=...) only")
        vocabularies = [m.config.get_text_config().vocab_size for m in (self.little, model)]
        if vocabularies[0] > vocabularies[1]:
            raise ValueError(
                f"little must say tokens of the large model only; their vocabularies have {vocabularies[0]} and "
                f"{vocabularies[1]} tokens"
            )
        B = input_ids.shape[0]
        longest, stopping, pad = call.limits()
        processors = call.row_processors()
        mask = torch.ones(inputs.shape[:2], dtype=torch.int64) if mask is None else mask
        eos = getattr(call.config, "_eos_token_tensor", None)  # set by generate
        self.stats = DecodeStats(rule="surprisal_lossy", exact=False)
        texts = []
        with watch(self.monitor, B * (longest - input_ids.shape[1])):
            for row in range(B):
                here = slice(row, row + 1)
                encoded = self.little.get_encoder()(input_ids=inputs[here], attention_mask=mask[here])
                texts.append(
                    write_row(
                        CachedDecoder(model, encoder_outputs[0][here], mask[here]),
                        CachedDecoder(self.little, encoded[0], mask[here]),
                        input_ids[row],
                        fallback=self.fallback,
                        little_tokens=self.little_tokens,
                        rule=choose_rule(self.rule, DrawKind.DETERMINISTIC, False, processors),
                        processors=processors[row],
                        stopping=stopping,
                        longest=longest,
                        eos=frozenset() if eos is None else frozenset(eos.flatten().tolist()),
                        stats=self.stats,
                        streamer=call.streamer,
                        monitor=self.monitor,
                    )
                )
        if call.streamer is not None:
            call.streamer.end()
        return pad_and_stack(texts, pad)
