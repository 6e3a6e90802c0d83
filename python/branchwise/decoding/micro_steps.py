"""MicroSteps: several tokens per forward of the model, and one KV slot for all of them (card hamburger)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from ..attention import use_attention
from ..cache import KVStore
from ..forward import StoredModel
from ..kv.base import windowed_layers
from ..layers import decoder_layers
from ..noise import Noise, Seed, row_seeds
from ..target import Processor
from .call import Call, Decoder
from .keyed_sampler import draw_tokens
from .monitor import Monitor, watch
from .request import Ending, pad_and_stack
from .stats import DecodeStats


class MicroHead(Protocol):
    """What is trained beside the model; M is its hidden size. A module of the user's.

    Attributes:
        max_steps: most tokens of a group.
        feature_layers: layers after which hidden states are read; the last layer's are taken after the final norm.
    """

    max_steps: int
    feature_layers: Sequence[int]

    def merge(self, embeddings: Tensor, sizes: Tensor) -> Tensor:
        """One embedding [B, M] per group, from those of its tokens [B, S, M], of which the first i64[B] ``sizes``
        count. A group of one token must come out as it is."""
        ...

    def step(self, features: Tensor, last: Tensor | None, state: Any) -> tuple[Tensor, Tensor, Any]:
        """The next micro step of every row.

        Args:
            features: [B, F, M], of the forward that this group began with.
            last: [B, M] embeddings of the tokens that the step before said; None in the first step.
            state: what the step before returned last; None in the first step.

        Returns:
            [B, M] for the model's output embeddings; f32[B], the probability that the group ends with this token; and
            the state, a small cache of the head's own.
        """
        ...


class MicroSteps(Decoder):
    """A ``custom_generate`` callable for a model that was trained with a :class:`MicroHead` (HAMburger, Liu and Zhang
    2025, arXiv 2505.20438), **lossy** against the model without it.

    A forward of the model is followed by up to ``max_steps`` micro steps of the head, each of which says a token. The
    group of tokens is merged into one embedding, which goes through the model as one token at the position of the
    group's last one: it takes one slot of the KV store. Prompts are not merged. With groups of one token this is plain
    decoding, greedy or with the noise of :class:`branchwise.PositionKeyedSampler`.

    ``stats.forwards`` counts forwards of the model; ``slots`` is how many KV slots the rows of the last call took.

    Args:
        head: see :class:`MicroHead`.
        threshold: a group goes on while the probability that it does is at least this.
        max_steps: fewer than the head's, or None.
        seed: of the noise when sampling.
        monitor: shows progress, and ends calls early with what there is.

    Raises:
        ValueError: an option outside its range; when called: an unsupported model or request, a model with a sliding
            window, where slots would have to be positions, or one that scales or caps its logits.
    """

    def __init__(
        self,
        head: MicroHead,
        threshold: float = 0.8,
        max_steps: int | None = None,
        seed: Seed = None,
        monitor: Monitor | None = None,
    ) -> None:
        most = head.max_steps if max_steps is None else max_steps
        if not 1 <= most <= head.max_steps:
            raise ValueError(f"max_steps must lie between 1 and the head's {head.max_steps}, got {most}")
        self.head, self.threshold, self.max_steps, self.seed, self.monitor = head, threshold, most, seed, monitor
        self.stats = DecodeStats()
        self.slots: list[int] = []

    def decode(self, call: Call) -> Tensor:
        call.check()
        model, input_ids = call.model, call.input_ids
        if windowed := sorted(windowed_layers(model)):
            raise ValueError(f"layers {windowed} have a sliding window; with merged tokens, slots are no positions")
        text_config = model.config.get_text_config()
        for option in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if (value := getattr(text_config, option, None)) not in (None, 1, 1.0):
                raise ValueError(f"{type(model).__name__} has {option} = {value}, which micro steps would leave out")
        B, length = input_ids.shape
        longest, stopping, pad = call.limits()
        noise = None
        if call.config.do_sample:
            noise = Noise(row_seeds(self.seed, B), [prompt.numpy() for prompt in call.prompts])
        run = _Run(self, model, call.row_processors(), stopping, longest, noise)
        run.streamer = call.streamer
        with use_attention(model), watch(self.monitor, B * (longest - length)):
            run.decode(input_ids, call.starts)
        if run.streamer is not None:
            run.streamer.end()
        self.stats, self.slots = run.stats, run.slots
        return pad_and_stack([text[0] for text in run.texts], pad)


class _Run:
    """One call. Rows that finish leave the batch."""

    streamer: Any = None

    def __init__(
        self,
        options: MicroSteps,
        model: PreTrainedModel,
        processors: Sequence[Sequence[Processor]],
        stopping: StoppingCriteriaList,
        longest: int,
        noise: Noise | None,
    ) -> None:
        self.options, self.model, self.processors, self.noise = options, model, processors, noise
        self.ended = Ending(stopping, longest)
        self.stats = DecodeStats(rule="micro_steps", exact=False)
        self._features: dict[int, Tensor] = {}

    def decode(self, input_ids: Tensor, starts: list[int]) -> None:
        options, B = self.options, len(starts)
        self.texts = [input_ids[b : b + 1] for b in range(B)]
        self.starts, self.slots, self.rows = starts, [0] * B, list(range(B))
        self.stored = StoredModel(self.model, KVStore(B, input_ids.shape[1] + 64))
        layers = decoder_layers(self.model)
        last = len(layers) - 1
        hooks = [
            (self.model.base_model if index == last else layers[index]).register_forward_hook(self._note(index))
            for index in options.head.feature_layers
        ]
        try:
            features = self._prompts([input_ids[b, start:] for b, start in enumerate(starts)])
            while True:
                groups, going = self._group(features)
                cancelled = options.monitor is not None and options.monitor.cancelled
                if cancelled or not any(going):
                    break
                self._keep([i for i, on in enumerate(going) if on])
                features = self._forward([group for group, on in zip(groups, going, strict=True) if on])
        finally:
            for hook in hooks:
                hook.remove()
        self._keep([])
        self.stats.forwards = self.stored.forwards

    def _note(self, index: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._features[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    def _gather(self, at: Tensor) -> Tensor:
        """[B, F, M]: what the layers said at token i64[B] of each row."""
        rows = torch.arange(len(at))
        return torch.stack([self._features[index][rows, at] for index in self.options.head.feature_layers], 1)

    def _prompts(self, prompts: Sequence[Tensor]) -> Tensor:
        features: list[Tensor] = []

        def after_chunk(ends: Tensor) -> None:
            here = self._gather((ends.long() - 1).clamp(min=0))
            features[:] = [here if not features else torch.where((ends > 0)[:, None, None], here, features[0])]

        self.stored.extend(prompts, after_chunk)
        self.stats.row_forwards += len(prompts) * self.stored.forwards
        return features[0]

    def _forward(self, groups: Sequence[list[int]]) -> Tensor:
        """Reads every row's group as one token, at the position of its last one."""
        sizes = torch.tensor([len(group) for group in groups])
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(group) for group in groups], batch_first=True)
        embedded = self.options.head.merge(self.model.get_input_embeddings()(tokens), sizes)
        positions = torch.tensor([[self.texts[row].shape[1] - self.starts[row] - 1] for row in self.rows])
        self.stored.forward(tokens[:, :1], positions, wanted=[0], embeddings=embedded[:, None])
        self.stored.store.advance(torch.ones(len(groups), dtype=torch.int32))
        self.stats.row_forwards += len(groups)
        return self._gather(torch.zeros(len(groups), dtype=torch.int64))

    def _group(self, features: Tensor) -> tuple[list[list[int]], list[bool]]:
        """What every row says now, and whether its text goes on."""
        options, head = self.options, self.model.get_output_embeddings()
        groups: list[list[int]] = [[] for _ in self.rows]
        going, open_ = [True] * len(self.rows), [True] * len(self.rows)
        last, state = None, None
        for _ in range(options.max_steps):
            hidden, ends, state = options.head.step(features, last, state)
            tokens = self._choose(head(hidden).float(), open_)
            for i, row in enumerate(self.rows):
                if not open_[i]:
                    continue
                groups[i].append(int(tokens[i]))
                text = self.texts[row] = torch.cat([self.texts[row], tokens[i].view(1, 1)], 1)
                if self.streamer is not None:
                    self.streamer.put(tokens[i : i + 1])
                if self.ended(text):
                    going[i] = False
                open_[i] = going[i] and 1 - float(ends[i]) >= options.threshold
            if not any(open_):
                break
            last = self.model.get_input_embeddings()(tokens)
        said = sum(map(len, groups))
        self.stats.emitted += said
        if options.monitor is not None:
            options.monitor.advance(said)
        return groups, going

    def _choose(self, logits: Tensor, wanted: Sequence[bool]) -> Tensor:
        """One token i64[B] per row, under the row's processors; of rows that are not wanted, any."""
        for i, row in enumerate(self.rows):
            for processor in self.processors[row] if wanted[i] else ():
                logits[i] = processor(self.texts[row], logits[i : i + 1].clone())[0]
        if self.noise is None:
            return logits.argmax(-1)
        lengths = torch.tensor([[self.texts[row].shape[1] - self.starts[row]] for row in self.rows])
        return draw_tokens(logits, self.noise.at_positions(lengths))

    def _keep(self, kept: list[int]) -> None:
        lens = self.stored.store.seq_lens.tolist()
        for i, row in enumerate(self.rows):
            self.slots[row] = lens[i]
        if kept and len(kept) < len(self.rows):
            self.stored.store.select_rows(kept)
            if self.noise is not None:
                self.noise.keep(kept)
        self.rows = [self.rows[i] for i in kept]
