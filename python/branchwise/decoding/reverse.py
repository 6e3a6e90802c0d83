"""ReverseSpeculative: a teacher proposes tokens, a student keeps those that it could have said (card rsd)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from ..attention import check_supported, use_attention
from ..cache import KVStore
from ..forward import StoredModel
from ..noise import Noise, Purpose, Seed, row_seeds
from .call import Call, Decoder
from .monitor import Monitor, watch
from .request import Ending, pad_and_stack
from .stats import DecodeStats

FALLBACK = -1  # the trial of a token that the student drew itself


@dataclass
class Trace:
    """One row's new tokens and where they came from.

    Attributes:
        tokens: ids, the end token included.
        trials: per token, which of the teacher's draws it was, from 0; :data:`FALLBACK` for the student's own.
        probabilities: per token, the student's.
    """

    tokens: list[int] = field(default_factory=list)
    trials: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)

    @property
    def share_of_teacher(self) -> float:
        return sum(trial != FALLBACK for trial in self.trials) / max(len(self.trials), 1)


class ReverseSpeculative(Decoder):
    """A ``custom_generate`` callable for the *student*, **lossy**: makes training texts in a teacher's words that the
    student finds likely (Kim et al. 2025, arXiv 2509.22230).

    At every position the teacher draws up to ``trials`` tokens from its ``top_k`` likeliest; the first that is among
    the student's ``top_k`` and to which the student gives at least ``floor`` is taken. If none is, the student draws
    from its own ``top_k``. With T' and S' the two renormalised distributions, A the tokens that pass, a = T'(A):

        P(x) = [x in A] T'(x) (1 - (1 - a)^trials) / a + (1 - a)^trials S'(x)

    The teacher runs token by token; the student reads ``draft_length`` of them in one forward, which changes nothing:
    noise belongs to positions. Ends of texts must pass like any token. ``traces`` and ``stats`` describe the last call.

    Args:
        teacher: a decoder-only model with the student's tokenizer; ids beyond the smaller vocabulary are never said.
        floor: p_th, of the student's softmax at ``floor_temperature``.
        trials: M.
        top_k: K, of both models; of equals the lower ids.
        temperature, top_p: of both models' draws; top-p is taken of the K likeliest.
        floor_temperature: 1 compares with the student's raw probabilities.
        draft_length: most tokens between two forwards of the student.
        seed: of the noise, see :func:`branchwise.noise.row_seeds`.
        monitor: shows progress, and ends calls early; see :class:`branchwise.Monitor`.

    Raises:
        ValueError: an option outside its range, an unsupported model.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        floor: float = 0.01,
        trials: int = 5,
        top_k: int = 20,
        temperature: float = 0.7,
        top_p: float = 0.95,
        floor_temperature: float = 1.0,
        draft_length: int = 8,
        seed: Seed = None,
        monitor: Monitor | None = None,
    ) -> None:
        for name, value in {"trials": trials, "top_k": top_k, "draft_length": draft_length}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, number in {"temperature": temperature, "floor_temperature": floor_temperature}.items():
            if number <= 0:
                raise ValueError(f"{name} must be positive, got {number}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if floor < 0:
            raise ValueError(f"floor must be at least 0, got {floor}")
        check_supported(teacher)
        self.teacher, self.floor, self.trials, self.top_k = teacher, floor, trials, top_k
        self.temperature, self.top_p, self.floor_temperature = temperature, top_p, floor_temperature
        self.draft_length, self.seed, self.monitor = draft_length, seed, monitor
        self.traces: list[Trace] = []
        self.stats = DecodeStats()

    def decode(self, call: Call) -> Tensor:
        call.check()
        if call.processors:
            raise ValueError(
                f"ReverseSpeculative draws by options of its own, for both models alike; it cannot use "
                f"{type(call.processors[0]).__name__}"
            )
        input_ids, prompts, streamer = call.input_ids, call.prompts, call.streamer
        longest, stopping, pad = call.limits()
        noise = Noise(row_seeds(self.seed, len(prompts)), [prompt.numpy() for prompt in prompts])
        run = _Run(self, call.model, prompts, noise)
        self.traces = [Trace() for _ in prompts]
        with watch(self.monitor, len(prompts) * (longest - input_ids.shape[1])):
            run.decode(self.traces, input_ids, longest, stopping)
        self.stats = run.stats
        if streamer is not None:
            for trace in self.traces:
                streamer.put(torch.tensor(trace.tokens))
            streamer.end()
        texts = [torch.cat([input_ids[b], torch.tensor(trace.tokens)]) for b, trace in enumerate(self.traces)]
        return pad_and_stack(texts, pad)

    def distribution(self, logits: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """The ``top_k`` likeliest tokens i64[n, K] of logits [n, V], best first, and the chances f64[n, K] with which
        they are drawn."""
        values = logits[:, :vocabulary].double() / self.temperature
        values, tokens = values.sort(dim=-1, descending=True, stable=True)
        values, tokens = values[:, : self.top_k], tokens[:, : self.top_k]
        p = values.softmax(-1)
        inside = p.cumsum(-1) - p < self.top_p  # up to the token that reaches it
        p = torch.where(inside, p, 0)
        return tokens, p / p.sum(-1, keepdim=True)

    def passes(self, logits: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """The student's probabilities f64[n, V], and which tokens may be taken, bool[n, V]."""
        values = logits[:, :vocabulary].double()
        p = (values / self.floor_temperature).softmax(-1)
        order = values.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        among = torch.zeros_like(p).scatter(1, order, 1.0).bool()
        return p, among & (p >= self.floor)


class _Run:
    """Two models over the same texts."""

    def __init__(
        self, options: ReverseSpeculative, student: PreTrainedModel, prompts: Sequence[Tensor], noise: Noise
    ) -> None:
        self.options, self.noise = options, noise
        self.models = (student, options.teacher)
        self.vocabulary = min(m.config.get_text_config().vocab_size for m in self.models)
        longest = max(map(len, prompts)) + 256
        self.student, self.teacher = (StoredModel(m, KVStore(len(prompts), longest)) for m in self.models)
        self.lengths = [len(prompt) for prompt in prompts]  # of the texts, both models' but for the last token
        self.stats = DecodeStats(rule="reverse_speculative", exact=False)
        self._prompts = prompts

    def decode(self, traces: list[Trace], input_ids: Tensor, longest: int, stopping: StoppingCriteriaList) -> None:
        options, B = self.options, len(traces)
        ending = Ending(stopping, longest)
        last = torch.stack([prompt[-1] for prompt in self._prompts])
        begun = time.perf_counter()
        self._prefill()
        self.stats.seconds_prefill = time.perf_counter() - begun
        active = list(range(B))
        padded = input_ids.shape[1]
        monitor = options.monitor
        while active and not (monitor is not None and monitor.cancelled):
            room = longest - padded - min(len(traces[b].tokens) for b in active)
            g = max(min(options.draft_length, room), 1)
            begun = time.perf_counter()
            drafts, draws = self._draft(active, last, g)
            drafted = time.perf_counter()
            logits = self._student_logits(torch.cat([last[:, None], drafts[:, : g - 1]], 1))
            self.stats.seconds_draft += drafted - begun
            self.stats.seconds_forward += time.perf_counter() - drafted
            kept, emitted = [], self.stats.emitted
            for i, b in enumerate(active):
                new = self._verify(i, logits[i], draws[i], traces[b])
                said = 0
                for token, trial, probability in new:
                    trace = traces[b]
                    trace.tokens.append(token)
                    trace.trials.append(trial)
                    trace.probabilities.append(probability)
                    said += 1
                    text = torch.cat([input_ids[b], torch.tensor(trace.tokens)])[None]
                    if ending(text):
                        break
                else:
                    kept.append(i)
                self.lengths[i] += said
                last[i] = traces[b].tokens[-1]
                self.stats.drafted += g
                self.stats.accepted += sum(trial != FALLBACK for _, trial, _ in new[:said])
                self.stats.emitted += said
            self.stats.row_forwards += len(active)
            if monitor is not None:
                monitor.advance(self.stats.emitted - emitted)
            # Keys of what was said; the last token is new to both.
            lengths = torch.tensor([n - 1 for n in self.lengths], dtype=torch.int32)
            self.student.store.set_lengths(lengths)
            self.teacher.store.set_lengths(lengths)
            if len(kept) < len(active) and kept:
                for model in (self.student, self.teacher):
                    model.store.select_rows(kept)
                self.noise.keep(kept)
                last, self.lengths = last[kept], [self.lengths[i] for i in kept]
            active = [active[i] for i in kept]
        self.stats.forwards = self.student.forwards

    def _prefill(self) -> None:
        heads = [prompt[:-1] for prompt in self._prompts]
        for model in (self.student, self.teacher):
            if any(len(head) for head in heads):
                with use_attention(model.model):
                    model.extend(heads)

    def _draft(self, active: Sequence[int], last: Tensor, g: int) -> tuple[Tensor, list[list[Tensor]]]:
        """A chain of the teacher's first draws i64[B, g], and all its draws of every position, i64[M] each."""
        options, store = self.options, self.teacher.store
        lengths = torch.tensor(self.lengths)
        chain, draws = [], [[] for _ in active]  # type: ignore[var-annotated]
        token = last
        for step in range(g):
            positions = (lengths - 1 + step)[:, None]
            with use_attention(self.teacher.model):
                logits = self.teacher.forward(token[:, None], positions)[:, 0]
            store.advance(torch.ones(len(active), dtype=torch.int32))
            tokens, p = options.distribution(logits, self.vocabulary)
            # Draw m of a position: uniform m of that position.
            places = (lengths + step)[:, None].expand(-1, options.trials)
            trials = torch.arange(options.trials).expand(len(active), -1)
            uniforms = self.noise.uniforms(places, trials, Purpose.DRAFT)[..., 1].double()
            drawn = tokens.gather(1, _pick(p, uniforms))
            for i in range(len(active)):
                draws[i].append(drawn[i])
            token = drawn[:, 0]
            chain.append(token)
        return torch.stack(chain, 1), draws

    def _student_logits(self, tokens: Tensor) -> Tensor:
        positions = torch.tensor(self.lengths)[:, None] - 1 + torch.arange(tokens.shape[1])
        with use_attention(self.student.model):
            return self.student.forward(tokens, positions)

    def _verify(self, row: int, logits: Tensor, draws: Sequence[Tensor], trace: Trace) -> list[tuple[int, int, float]]:
        """Tokens that are said, up to the first that is not the chain's: token, trial, student's probability."""
        options = self.options
        probabilities, allowed = options.passes(logits, self.vocabulary)
        said = []
        for i, candidates in enumerate(draws):
            trial = next((m for m, token in enumerate(candidates.tolist()) if bool(allowed[i, token])), FALLBACK)
            if trial == FALLBACK:
                tokens, p = options.distribution(logits[i : i + 1], self.vocabulary)
                place = torch.tensor([self.lengths[row] + i])
                coin = self.noise.row_uniforms(row, place, place * 0, Purpose.TARGET)[:, 1].double()
                token = int(tokens.gather(1, _pick(p, coin[None])))
            else:
                token = int(candidates[trial])
            said.append((token, trial, float(probabilities[i, token])))
            if trial != 0 and token != int(candidates[0]):
                break
        return said


def _pick(p: Tensor, uniforms: Tensor) -> Tensor:
    """Indices i64[n, m] drawn from f64[n, K] chances by f64[n, m] uniforms."""
    found = torch.searchsorted(p.cumsum(-1), uniforms, right=True)
    last = p.shape[1] - 1 - (p > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(found, last)


def write_traces(path: str | Path, prompts: Iterable[str], texts: Iterable[str], traces: Iterable[Trace]) -> None:
    """One JSON object per line, as the ``datasets`` package reads them: prompt, text, ids, trials and the student's
    probabilities.

    Raises:
        ModuleNotFoundError: the package ``datasets`` is not installed.
        ValueError: not as many prompts and texts as traces.
    """
    from datasets import Dataset

    rows = [
        {
            "prompt": prompt,
            "text": text,
            "tokens": trace.tokens,
            "trials": trace.trials,
            "probabilities": trace.probabilities,
            "share_of_teacher": trace.share_of_teacher,
        }
        for prompt, text, trace in zip(prompts, texts, traces, strict=True)
    ]
    Dataset.from_list(rows).to_json(path)
