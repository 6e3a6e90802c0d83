"""Early exit, lossy: a token is taken from the first layer that is sure of it, and hopeless texts are ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ..attention import use_attention
from ..cache import KVStore
from ..forward import StoredModel
from ..layers import LayerSwitch, pass_through
from .call import Call, Decoder
from .request import Ending, pad_and_stack
from .stats import DecodeStats

# Hidden states [n, H] after a layer -> logits [n, 3] of stop, exit and continue.
Controller = Callable[[Tensor], Tensor]
_STOP, _EXIT = 0, 1


class EarlyExitLossy(Decoder):
    """A ``custom_generate`` callable for greedy decoding with fewer layers, **lossy**: other tokens than the model's
    own (card early-exit, B and C; SoFT, Kavehzadeh et al. 2023, arXiv 2309.08968, and the stop-and-exit controller of
    arXiv 2401.09964). For the lossless use of early layers see :class:`branchwise.drafters.EarlyExit`.

    After each exit layer the final norm and head give the next token. It is taken if its probability reaches the
    layer's threshold, else the layers up to the next exit run. Layers that were left out see the token later, together
    with others, when a token needs them: keys and values are always those of the full model, never copies. The prompt
    runs through all layers.

    Args:
        thresholds: by number of layers, the probability from which a token is taken there; above 1, never. Models that
            were not trained for exits are overconfident or useless there: measure first.
        controller: decides instead of the thresholds, which then only name the layers: a token is taken where "exit"
            is likeliest and reaches ``exit_threshold``; a text ends, as if with EOS, where "stop" is likeliest and
            reaches ``stop_threshold``. Trained per model; called with the hidden states before the final norm.
        exit_threshold, stop_threshold: see ``controller``.

    Attributes:
        exits: of the last call, by number of layers, how many tokens were taken there.
        stopped: of the last call, rows that the controller ended.
        stats: of the last call; ``exact`` is False.

    Raises:
        ValueError: no exits, or one that is not positive; when called: an exit behind the model's last layer, sampling,
            an unsupported model or request.
    """

    def __init__(
        self,
        thresholds: Mapping[int, float],
        controller: Controller | None = None,
        exit_threshold: float = 0.0,
        stop_threshold: float = 0.9,
    ) -> None:
        if not thresholds or min(thresholds) < 1:
            raise ValueError(f"thresholds must name at least one positive number of layers, got {dict(thresholds)}")
        self.thresholds = dict(sorted(thresholds.items()))
        self.controller, self.exit_threshold, self.stop_threshold = controller, exit_threshold, stop_threshold
        self.exits: dict[int, int] = {}
        self.stopped: list[int] = []
        self.stats = DecodeStats()

    def decode(self, call: Call) -> Tensor | GenerateDecoderOnlyOutput:
        call.check(returns_dict=True)
        model, input_ids, config = call.model, call.input_ids, call.config
        if config.do_sample:
            raise ValueError("EarlyExitLossy decodes greedily: pass do_sample=False")
        layers = model.config.get_text_config().num_hidden_layers
        if max(self.thresholds) >= layers:
            raise ValueError(f"exits must lie before the model's last layer, {layers}, got {max(self.thresholds)}")
        if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
            raise ValueError(f"{type(model).__name__} has layers that read the keys of earlier ones within a forward")
        prompts, streamer = call.prompts, call.streamer
        stopping = call.stopping or StoppingCriteriaList()
        max_length = stopping.max_length or config.max_length
        ending = Ending(stopping, max_length)
        processors = call.row_processors()
        self.exits = dict.fromkeys([*self.thresholds, layers], 0)
        self.stopped, self.stats = [], DecodeStats(rule="early_exit_lossy", exact=False)
        texts = [input_ids[b : b + 1] for b in range(len(prompts))]
        ended = [False] * len(prompts)

        def choose(row: int, logits: Tensor) -> tuple[int, float]:
            scores = logits[None].float()
            for processor in processors[row]:
                scores = processor(texts[row], scores)
            probability, token = scores.softmax(-1).max(-1)
            return int(token), float(probability)

        def say(row: int, token: int) -> None:
            texts[row] = torch.cat([texts[row], torch.tensor([[token]])], 1)
            self.stats.emitted += 1
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            ended[row] = ending(texts[row])

        with use_attention(model):
            staged = _StagedModel(model, prompts, list(self.thresholds), max_length)
            try:
                for row, logits in enumerate(staged.prompt()):
                    say(row, choose(row, logits)[0])
                while not all(ended):
                    self._step(staged, texts, ended, choose, say)
            finally:
                staged.close()
        self.stats.forwards = staged.model.forwards
        if streamer is not None:
            streamer.end()
        pad = getattr(config, "_pad_token_tensor", None)
        sequences = pad_and_stack([text[0] for text in texts], 0 if pad is None else int(pad.flatten()[0]))
        return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences

    def _step(self, staged: _StagedModel, texts: list[Tensor], ended: list[bool], choose: Any, say: Any) -> None:
        """One token for every row that has not ended."""
        waiting = [row for row, done in enumerate(ended) if not done]
        staged.begin(torch.stack([text[0, -1] for text in texts]))
        for stage, depth in enumerate(self.exits):
            logits, hidden = staged.run(stage)
            for row in list(waiting):
                token, probability = choose(row, logits[row])
                taken = stage == len(self.thresholds) or probability >= self.thresholds[depth]
                if self.controller is not None and stage < len(self.thresholds):
                    verdict = self.controller(hidden[row : row + 1]).softmax(-1)[0]
                    likeliest = int(verdict.argmax())
                    taken = likeliest == _EXIT and float(verdict[_EXIT]) >= self.exit_threshold
                    if likeliest == _STOP and float(verdict[_STOP]) >= self.stop_threshold:
                        self.stopped.append(row)
                        ended[row] = True
                        waiting.remove(row)
                        continue
                if taken:
                    self.exits[depth] += 1
                    say(row, token)
                    waiting.remove(row)
            if not waiting:
                return


class _StagedModel:
    """A model cut into stages of layers, each with as many tokens in its KV slots as have come so far.

    ``done[s][b]``: tokens of row b that stage s has seen; ``late[s][b]``: hidden states [n, H] that the stage before
    left for it.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Tensor], exits: Sequence[int], max_length: int
    ) -> None:
        longest = max(map(len, prompts))
        self.model = StoredModel(model, KVStore(len(prompts), longest + min(512, max_length)))
        self._prompts = prompts
        self._switch = LayerSwitch(model, watch=frozenset(exit_ - 1 for exit_ in exits))
        self._bounds = [0, *exits, len(self._switch.layers)]

    def prompt(self) -> Tensor:
        """Logits [B, V] after the prompts, which go through all layers."""
        logits = self.model.extend(self._prompts)[:, 0]
        stages, B = len(self._bounds) - 1, len(self._prompts)
        self._done = [self.model.store.seq_lens.clone() for _ in range(stages)]
        self._late: list[list[list[Tensor]]] = [[[] for _ in range(B)] for _ in range(stages)]
        return logits

    def begin(self, tokens: Tensor) -> None:
        """The next token i64[B] of every row."""
        self._tokens = tokens

    def run(self, stage: int) -> tuple[Tensor, Tensor]:
        """Runs a stage on what waits for it; logits [B, V] and hidden states [B, H] behind the last token."""
        begin, end = self._bounds[stage], self._bounds[stage + 1]
        skip = [*range(begin), *range(end, self._bounds[-1])]
        self._switch.replace = dict.fromkeys(skip, pass_through)
        late = self._late[stage]
        lengths = torch.ones(len(self._tokens), dtype=torch.int32)
        tokens = self._tokens[:, None]
        if stage > 0:
            lengths = torch.tensor([len(row) for row in late], dtype=torch.int32)
            states = torch.nn.utils.rnn.pad_sequence([torch.stack(row) for row in late], batch_first=True)
            tokens = tokens.expand(-1, states.shape[1])
            self._switch.replace[begin - 1] = lambda hidden, kwargs: states
        store = self.model.store
        store.set_lengths(self._done[stage])
        positions = store.seq_lens[:, None] + torch.arange(tokens.shape[1])
        wanted = sorted(set((lengths - 1).tolist()))
        logits = self.model.forward(tokens, positions, wanted=wanted)
        self._done[stage] = self._done[stage] + lengths
        rows, ends = torch.arange(len(lengths)), (lengths - 1).long()
        picked = logits[rows, torch.tensor([wanted.index(int(e)) for e in ends])]
        self._late[stage] = [[] for _ in late]
        if end == self._bounds[-1]:
            return picked, picked.new_empty(0)
        out = self._switch.outputs[end - 1]
        for row, length in enumerate(lengths.tolist()):
            self._late[stage + 1][row] += out[row, :length]
        return picked, out[rows, ends]

    def close(self) -> None:
        self._switch.remove()
