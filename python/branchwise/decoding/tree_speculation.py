"""Tree speculation: guess a tree, score it in one forward, keep the path the target agrees with."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from ..acceptance import Rule, choose_rule
from ..attention import use_attention
from ..cache import KVScales
from ..drafters import Drafter
from ..graphs import recorder_for
from ..kv import policy_of
from ..kv_scales import measure_kv_scales
from ..noise import Noise, Seed, row_seeds
from ..tree import DrawKind
from .auto import Auto, drafter_of
from .bandit import Bandit
from .call import Call, Decoder
from .monitor import Monitor, watch
from .rounds import GraphedRounds
from .stats import DecodeStats
from .tree_run import TreeRun, TreeSpeculationOutput
from .tree_size import TreeSizer, cost_model


class TreeSpeculation(Decoder):
    """A ``custom_generate`` callable: ``model.generate(**inputs, custom_generate=TreeSpeculation())``.

    Greedy decoding gives the tokens of plain ``generate`` (fp32: token for token; in 16 bits of ``drafter="none"``).
    Sampling keeps the target's distribution exactly; for retrieved drafts it gives the very tokens of
    :class:`branchwise.PositionKeyedSampler` with the same seed (in 16 bits of ``drafter="none"``). Logits processors
    see each node's own text. Any batch size, left-padded as usual.

    One object keeps what its drafter and its cost estimates learned across calls; make one per user if texts must not
    influence each other's speed. ``stats`` describes the last finished call.

    Args:
        drafter: "auto" (:class:`branchwise.Auto`), a name in :data:`branchwise.drafters.BY_NAME`, or any
            :class:`branchwise.drafters.Drafter`.
        max_nodes: most nodes per row and forward, root included.
        adaptive: ask the drafter only in rounds where it pays and verify only as many nodes as pay, by measured cost
            and acceptance; False always uses ``max_nodes``. Controllers ("auto") do so whatever is said here. Drafts
            that are drawn are never cut, as that would depend on the draws.
        rule: an acceptance rule or its name; None for the exact one that accepts most, see
            :func:`branchwise.acceptance.choose_rule`.
        seed: of the noise when sampling, see :func:`branchwise.noise.row_seeds`. A row's noise depends on its seed
            and its prompt, not on the rest of the batch.
        monitor: shows progress, and ends calls early; see :class:`branchwise.Monitor`.
        graphs: with a model on a GPU, run rounds in CUDA graphs where the model can be recorded. The KV slots of the
            largest batch stay allocated between calls then, as the graphs write there; weights may be trained in place,
            but changes to the model's modules (hooks, adapters that are switched) need a new object.
        deterministic: logits depend on the text alone, bit for bit. So what is said greedily, or sampled from retrieved
            drafts, does not depend on the drafter, what it remembers, the machine's speed of the moment, or the batch.
            For dense models of ``torch.nn.Linear`` layers without a KV policy. None: on the CPU in bfloat16 and
            float16, and with a ``kv_dtype``, where near-ties would be a matter of rounding otherwise; a forward over a
            tree takes up to 6 % longer there, one over a single token 3 to 8 % (SmolLM2, 2 cores with AMX, 200 to 4000
            tokens of prefix; ``bench/deterministic.py``).
        kv_dtype: of the KV cache: None for the model's, or ``torch.float8_e4m3fn`` for a byte per value, rounded with
            factors per layer and KV head that depend on the model alone (:func:`branchwise.measure_kv_scales`; they are
            measured once per object and model). The model is another one then: its plain decoding is ``drafter="none"``
            with this ``kv_dtype``, and what is above holds in comparison with that. Without a KV policy, and without
            drafters that share the target's cache ("early_exit").

    Raises:
        ValueError: unknown drafter, ``max_nodes`` outside 1..1024, another ``kv_dtype``; and when called: an
            unsupported model or request, a rule that does not fit, or a KV policy with a model on a GPU,
            ``deterministic=True`` or a ``kv_dtype``.
    """

    def __init__(
        self,
        drafter: str | Drafter = "auto",
        max_nodes: int = 32,
        adaptive: bool = True,
        rule: str | Rule | None = None,
        seed: Seed = None,
        monitor: Monitor | None = None,
        graphs: bool = True,
        deterministic: bool | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= max_nodes <= 1024:
            raise ValueError(f"max_nodes must lie between 1 and 1024, got {max_nodes}")
        if kv_dtype not in (None, torch.float8_e4m3fn):
            raise ValueError(f"kv_dtype must be None or torch.float8_e4m3fn, got {kv_dtype}")
        self.drafter = drafter_of(drafter)
        self.max_nodes = max_nodes
        self.adaptive = adaptive
        self.rule = rule
        self.seed = seed
        self.monitor = monitor
        self.graphs = graphs
        self.deterministic = deterministic
        self.kv_dtype = kv_dtype
        self.stats = DecodeStats()
        self._sizers: WeakKeyDictionary[PreTrainedModel, TreeSizer] = WeakKeyDictionary()
        self._rounds: WeakKeyDictionary[PreTrainedModel, GraphedRounds] = WeakKeyDictionary()
        self._kv_scales: WeakKeyDictionary[PreTrainedModel, tuple[torch.device, KVScales]] = WeakKeyDictionary()

    def decode(self, call: Call) -> Tensor | TreeSpeculationOutput:
        call.check(returns_dict=True, on_cuda=True)
        model, config, prompts = call.model, call.config, call.prompts
        processors = call.row_processors()
        rule = choose_rule(self.rule, self.drafter.draws, bool(config.do_sample), processors)
        stopping = call.stopping or StoppingCriteriaList()
        longest = stopping.max_length or config.max_length
        seeds = row_seeds(self.seed, len(prompts)) if config.do_sample or not rule.exact else [0] * len(prompts)
        drawn = self.drafter.draws is not DrawKind.DETERMINISTIC and config.do_sample
        # The controllers size their trees themselves.
        adaptive = self.adaptive and not drawn and not isinstance(self.drafter, (Auto, Bandit))
        cost = cost_model(model)
        sizer = self._sizers.setdefault(model, TreeSizer(cost))
        kv_scales = self._scales_of(model)
        rounds = self._graphed_rounds(call, longest, kv_scales)
        run = TreeRun(
            model=model,
            config=config,
            rule=rule,
            processors=processors,
            noise=Noise(seeds, [prompt.numpy() for prompt in prompts]),
            stopping=[stopping] * len(prompts),
            streamer=call.streamer,
            max_nodes=self.max_nodes,
            cost=cost,
            sizer=sizer if adaptive else None,
            monitor=self.monitor,
            rounds=rounds,
            deterministic=self._is_deterministic(model),
            kv_scales=kv_scales,
        )
        with use_attention(model), watch(self.monitor, len(prompts) * (longest - call.input_ids.shape[1])):
            store = None if rounds is None else rounds.store
            run.decode(self.drafter, list(call.input_ids), call.starts, [longest] * len(prompts), store)
        self.stats = run.stats
        return run.result(model.device)

    def _is_deterministic(self, model: PreTrainedModel) -> bool:
        policy = policy_of(model)
        if self.deterministic and policy is not None:
            raise ValueError(
                f"deterministic decoding goes without a KV policy so far, and the model has {type(policy).__name__}"
            )
        if self.deterministic is None:
            rounded = model.dtype != torch.float32 or self.kv_dtype is not None
            return model.device.type == "cpu" and policy is None and rounded
        return self.deterministic

    def _scales_of(self, model: PreTrainedModel) -> KVScales | None:
        if self.kv_dtype is None:
            return None
        policy = policy_of(model)
        if policy is not None:
            raise ValueError(f"kv_dtype goes without a KV policy so far, and the model has {type(policy).__name__}")
        device, scales = self._kv_scales.get(model, (None, []))
        if device != model.device:
            scales = measure_kv_scales(model)
            self._kv_scales[model] = model.device, scales
        return scales

    def _graphed_rounds(self, call: Call, longest: int, kv_scales: KVScales | None) -> GraphedRounds | None:
        """Those of an earlier call with the model, if they are still good; None where there are no graphs."""
        model, rows = call.model, len(call.prompts)
        recorder = recorder_for(model.device) if self.graphs else None
        # A cache that is returned is the caller's.
        if recorder is None or policy_of(model) is not None or call.config.return_dict_in_generate:
            return None
        rounds = self._rounds.get(model)
        if rounds is None or not rounds.serve(model, rows):
            self._rounds.pop(model, None)  # frees its slots before there are others
            slots = max(map(len, call.prompts)) + min(longest - call.input_ids.shape[1], 512) + 2 * self.max_nodes
            rounds = self._rounds[model] = GraphedRounds(recorder, model, rows, slots, self.max_nodes, kv_scales)
        rounds.store.begin(rows)
        return rounds
