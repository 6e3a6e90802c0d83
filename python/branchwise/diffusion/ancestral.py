"""Ancestral sampling in few steps, plain and guided by a reward (DiDi-Instruct's samplers; card didi-instruct)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import use_attention
from ..decoding.call import Call, Decoder
from ..decoding.request import pad_and_stack
from ..decoding.stats import DecodeStats
from ..noise import Noise, Purpose, Seed, row_seeds
from .decoder import sampling_of
from .engine import PlainEngine, TreeEngine
from .model import block_pattern
from .spec import DiffusionSpec, runs_on_kernels, spec_of
from .window import Kind, Window

REMOVALS = ("ancestral", "greedy", "none")
_FIRST, _LAST, _CLEAN = 1.0, 1e-5, 1e-3


def visible(t: float) -> float:
    """Probability that a token is not masked at time t: log-linear noise."""
    return 1 - (1 - _CLEAN) * t


class AncestralSampling(Decoder):
    """A ``custom_generate`` callable: samples the reverse of the masking process in ``steps`` forwards.

    A step from time t to s unmasks every mask with probability ``(a(s) - a(t)) / (1 - a(t))``, a the share of visible
    tokens, with a token of the model's softmax; unmasked tokens never change. A step before which nothing changed uses
    the last predictions again. Other than the block-wise decoders it unmasks anywhere in the text.

    Args:
        steps: N; times run evenly from 1 to 1e-5.
        removal: what happens to masks that are left: "ancestral" draws their tokens, "greedy" takes the likeliest,
            "none" leaves the masks.
        spec: what the model is; None: :func:`branchwise.diffusion.spec_of`.
        seed: of the noise, see :func:`branchwise.noise.row_seeds`. A row's noise depends on its prompt, the position
            and the step.

    Raises:
        ValueError: an unknown option; when called: a model or request that does not fit.

    Source: card didi-instruct, algorithm, steps 1 to 3; Zheng et al. 2025, arXiv 2509.25035.
    """

    def __init__(
        self, steps: int = 32, removal: str = "ancestral", spec: DiffusionSpec | None = None, seed: Seed = None
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if removal not in REMOVALS:
            raise ValueError(f"removal must be one of {', '.join(REMOVALS)}, got {removal!r}")
        self.steps, self.removal, self.spec, self.seed = steps, removal, spec, seed
        self.stats = DecodeStats()

    def decode(self, call: Call) -> Tensor:
        call.check(causal=False)
        model, input_ids, streamer = call.model, call.input_ids, call.streamer
        temperature, processors = sampling_of(call.decoder, call.config, call.processors)
        if processors:
            raise ValueError(
                f"{call.decoder} samples the model's softmax as it is; it cannot use {type(processors[0]).__name__}"
            )
        longest, stopping, pad = call.limits()
        new_tokens = longest - input_ids.shape[1]
        prompts = [prompt.cpu() for prompt in call.prompts]
        spec = spec_of(model) if self.spec is None else self.spec
        spec.check_prompts(prompts)
        noise = Noise(row_seeds(self.seed, len(prompts)), [prompt.numpy() for prompt in prompts])
        chain = Chain(model, spec, prompts, new_tokens, noise, temperature or 1.0)
        with use_attention(model) if runs_on_kernels(model) else nullcontext():
            self._run(chain)
        self.stats = DecodeStats(rule=call.decoder, forwards=chain.engine.forwards, row_forwards=chain.row_forwards)
        texts = []
        for b, text in enumerate(chain.texts):
            whole = torch.cat([input_ids[b, : call.starts[b]].cpu(), text])
            # What follows the first end is not text.
            ends = range(input_ids.shape[1] + 1, longest)
            end = next((n for n in ends if stopping and bool(stopping(whole[None, :n], None).all())), longest)
            texts.append(whole[:end].to(input_ids.device))
        if streamer is not None:  # nothing is final before the end
            for text in texts:
                streamer.put(text[input_ids.shape[1] :].cpu())
            streamer.end()
        self.stats.emitted = sum(len(text) - input_ids.shape[1] for text in texts)
        return pad_and_stack(texts, pad)

    def _run(self, chain: Chain) -> None:
        times = torch.linspace(_FIRST, _LAST, self.steps + 1, dtype=torch.float64).tolist()
        for i in range(self.steps):
            now, then = visible(times[i]), visible(times[i + 1])
            chain.predict()
            self._step(chain, i, (then - now) / (1 - now))
        if self.removal != "none" and any(len(chain.masks(b)) for b in range(len(chain.texts))):
            chain.predict()
            for b in range(len(chain.texts)):
                at = chain.masks(b)
                tokens = chain.draw(b, chain.logits[b], at, self.steps, greedy=self.removal == "greedy")
                chain.put(b, at, tokens)

    def _step(self, chain: Chain, step: int, share: float) -> None:
        """Unmasks a share of what is masked."""
        for b in range(len(chain.texts)):
            chain.put(b, *chain.propose(b, chain.logits[b], step, share))


class Chain:
    """The texts of a batch on their way, and the predictions for their masks."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: DiffusionSpec,
        prompts: Sequence[Tensor],
        new_tokens: int,
        noise: Noise,
        temperature: float,
    ) -> None:
        self.spec, self.noise, self.temperature = spec, noise, temperature
        self.texts = [torch.cat([p, torch.full((new_tokens,), spec.mask_id)]) for p in prompts]
        self.engine: TreeEngine | PlainEngine = (
            TreeEngine(model, spec, len(prompts), max(map(len, self.texts)) + 64)
            if runs_on_kernels(model)
            else PlainEngine(model, spec)
        )
        self.logits: list[Tensor] = []  # [n, V] of the masks of every row
        self.row_forwards = 0
        self._changed = True
        self._exclude = torch.tensor(spec.never_said)

    def masks(self, row: int) -> Tensor:
        """i64[n], where masks are."""
        return torch.nonzero(self.texts[row] == self.spec.mask_id).flatten()

    def predict(self) -> None:
        """Logits of the masks, by a forward where some text has changed."""
        if self._changed:
            self.logits = self.engine.ask(range(len(self.texts)), [self._window(text) for text in self.texts], self)
            self.engine.keep([[] for _ in self.texts])
            self.row_forwards += len(self.texts)
            self._changed = False

    def read(self, row: int, window: Window, logits: Tensor) -> Tensor:
        return logits

    def draw(self, row: int, logits: Tensor, at: Tensor, step: int, candidate: int = 0, greedy: bool = False) -> Tensor:
        """Tokens i64[n] of the masks at i64[n] positions."""
        # Numbers that no two draws share: 2^20 positions, 2^8 candidates, and as many steps as there may be.
        keys = self.noise.position_keys(row, at + (candidate << 20) + (step << 28))
        temperature = 0.0 if greedy else self.temperature
        return ops.confidence(logits.contiguous(), self._exclude, temperature, keys)[0]

    def propose(self, row: int, logits: Tensor, step: int, share: float, candidate: int = 0) -> tuple[Tensor, Tensor]:
        """A step's positions i64[m] and tokens i64[m]."""
        at = self.masks(row)
        places = at + (candidate << 20)
        coins = self.noise.row_uniforms(row, places, torch.full_like(places, step), Purpose.VERIFY)[:, 0] < share
        return at[coins], self.draw(row, logits[coins], at[coins], step, candidate)

    def put(self, row: int, at: Tensor, tokens: Tensor) -> None:
        if len(at):
            self.texts[row] = self.texts[row].index_copy(0, at, tokens)
            self._changed = True

    def _window(self, text: Tensor) -> Window:
        # Beyond the first block with masks, too: the whole text as one state with nodes of its own.
        n = len(text)
        window = Window.of(Kind.LOOK, text[None].numpy(), 0, 0, self.spec.mask_id, 0, n, 0)
        window.block, window.width = self.spec.block_size, 1
        window.sees = block_pattern(n, window.block or n)
        return window


class Reward(Protocol):
    """What guides; any differentiable function of soft tokens."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """f32[b, n], a number per position, of f32[b, n, V] probabilities of tokens; a mask is its own token."""
        ...


class RewardGuidedSampling(AncestralSampling):
    """Ancestral sampling towards a reward: gradients tilt the early steps, candidates compete in the late ones.

    Early, the log-probabilities of masks move by h times the gradient of the sum of the masks' rewards with respect to
    them, each component cut to [-1, 1]; h grows from ``scale[0]`` to ``scale[1]``. Late, every step is drawn
    ``candidates`` times and one is picked with probability softmax of the whole texts' rewards. With ``scale`` (0, 0)
    and one candidate it is :class:`AncestralSampling`, number by number.

    Args:
        reward: see :class:`Reward`; DiDi-Instruct's is a discriminator's logits.
        scale: first and last h.
        candidates: M.
        rerank: share of the steps, the last ones, in which candidates compete.
        others: as for :class:`AncestralSampling`.

    Raises:
        ValueError: as :class:`AncestralSampling`, ``candidates`` outside 1..256, ``rerank`` outside [0, 1].

    Source: card didi-instruct, algorithm, steps 4 and 5. The reward sees the model's renormalised probabilities, as
    the later version of the reference code has it.
    """

    def __init__(
        self,
        reward: Reward | Callable[[Tensor], Tensor],
        steps: int = 32,
        scale: tuple[float, float] = (30.0, 40.0),
        candidates: int = 4,
        rerank: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(steps, **options)
        if not 1 <= candidates <= 256:
            raise ValueError(f"candidates must lie between 1 and 256, got {candidates}")
        if not 0 <= rerank <= 1:
            raise ValueError(f"rerank must lie between 0 and 1, got {rerank}")
        self.reward, self.scale, self.candidates, self.rerank = reward, scale, candidates, rerank

    def _step(self, chain: Chain, step: int, share: float) -> None:
        first_late = int(self.steps * (1 - self.rerank))
        for b in range(len(chain.texts)):
            if step < first_late:
                h = self.scale[0] + (self.scale[1] - self.scale[0]) * step / max(first_late - 1, 1)
                chain.put(b, *chain.propose(b, self._tilted(chain, b, h), step, share))
            else:
                drawn = [chain.propose(b, chain.logits[b], step, share, m) for m in range(self.candidates)]
                chain.put(b, *drawn[self._pick(chain, b, drawn, step)])

    def _tilted(self, chain: Chain, row: int, h: float) -> Tensor:
        """Logits of the masks, moved towards the reward."""
        logits, at = chain.logits[row], chain.masks(row)
        if h == 0 or len(at) == 0:
            return logits
        never = torch.tensor(chain.spec.never_said)
        log_probs = logits.float().index_fill(1, never, -torch.inf).log_softmax(-1)
        with torch.inference_mode(False), torch.enable_grad():
            # Clones, as the caller may be in inference mode, whose tensors take no part in gradients.
            at, text = at.clone(), chain.texts[row].clone()
            # The excluded ones have probability 0 and no gradient.
            moved = log_probs.clone().clamp(min=-1e6).requires_grad_(True)
            soft = torch.nn.functional.one_hot(text, logits.shape[1]).float()
            soft = soft.index_copy(0, at, moved.softmax(-1))
            total = self.reward(soft[None])[0, at].sum()
            (gradient,) = torch.autograd.grad(total, moved)
        return log_probs + h * gradient.clamp(-1, 1)

    def _pick(self, chain: Chain, row: int, drawn: Sequence[tuple[Tensor, Tensor]], step: int) -> int:
        """One of the candidates, likelier the better it is."""
        if len(drawn) == 1:
            return 0
        texts = torch.stack([chain.texts[row].index_copy(0, at, tokens) for at, tokens in drawn])
        vocabulary = chain.logits[row].shape[1]
        scores = self.reward(torch.nn.functional.one_hot(texts, vocabulary).float()).sum(1)
        share = scores.double().softmax(0).cumsum(0)
        place = torch.tensor([step])
        coin = float(chain.noise.row_uniforms(row, place, place * 0, Purpose.DRAFT)[0, 0])
        return min(int((share <= coin).sum()), len(drawn) - 1)
