"""Rules by name, which one is chosen, and what processors get to see. The laws are in test_verify_law.py."""

import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from branchwise import DrawKind, RowTree, TokenTree
from branchwise.acceptance import (
    GREEDY,
    MULTI_DRAFT,
    RULES,
    SAMPLE_AND_MATCH,
    TRAVERSAL,
    choose_rule,
    policy_lossy,
    thresholds_lossy,
    typical_lossy,
)
from branchwise.target import _IGNORE_TEXT, Target

V = 10
DRAWN = [DrawKind.WITH_REPLACEMENT, DrawKind.WITHOUT_REPLACEMENT]


def make(B=3, T=12, seed=0, draws=DrawKind.DETERMINISTIC):
    """Random trees with drafts of their own, logits and noise."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(B):
        n = int(rng.integers(2, T + 1))
        parents = [-1, *(int(rng.integers(max(0, i - 3), i)) for i in range(1, n))]
        tokens = [0]
        for i in range(1, n):
            taken = [tokens[j] for j in range(1, i) if parents[j] == parents[i]]
            tokens.append(int(rng.choice([t for t in range(V) if t not in taken])))
        draft = torch.rand(n, V, generator=g).softmax(-1)
        rows.append(
            RowTree(np.int32(tokens), np.int32(parents), np.ones(n, np.float32), draft, np.arange(n, dtype=np.int32))
        )
    tree = TokenTree(rows, torch.zeros(B, dtype=torch.int32), draws)
    return tree, torch.randn(*tree.shape, V, generator=g) * 3, torch.rand(*tree.shape, 2, generator=g)


def target(logits, processors=(), texts=None):
    B, T = logits.shape[:2]
    texts = [torch.full((1, 4 + T), b) for b in range(B)] if texts is None else texts
    return Target(logits, texts, [3] * B, [list(processors)] * B)


class Spy(logits_process.LogitsProcessor):
    def __init__(self):
        self.texts, self.calls = [], 0

    def __call__(self, ids, scores):
        self.calls += 1
        self.texts += ids.tolist()
        assert len(ids) == len(scores)
        return scores


def test_processors_see_each_nodes_own_text_in_order():
    row = RowTree(np.array([9, 1, 2, 3], np.int32), np.array([-1, 0, 1, 2], np.int32), np.ones(4, np.float32))
    tree = TokenTree([row], torch.tensor([1], dtype=torch.int32))
    logits = torch.full((1, 4, V), -50.0)
    for node, token in enumerate((1, 2, 7, 0)):
        logits[0, node, token] = 50.0
    for rule in (GREEDY, SAMPLE_AND_MATCH, RULES["each_child"]):
        spy = Spy()
        at = Target(logits, [torch.tensor([[8, 9, 0, 0, 0, 0, 0]])], [2], [[spy]])
        accepted = rule(tree, at, torch.full((1, 4, 2), 0.5))
        assert spy.texts == [[8, 9], [8, 9, 1], [8, 9, 1, 2]]
        assert accepted.tokens(tree, 0) == [1, 2, 7] and accepted.path(0) == [0, 1, 2]


def exact_and_lossy():
    return [*RULES.values(), thresholds_lossy(0.5, 0.8), policy_lossy("surprisal", 1.0), typical_lossy(0.2)]


@pytest.mark.parametrize("rule", exact_and_lossy(), ids=lambda rule: rule.name)
def test_lazily_processed_rows_give_the_verdict_of_processing_all(rule):
    """Warpers and a penalty that depends on the path, against every node processed by hand beforehand."""
    for seed in range(8):
        tree, logits, uniforms = make(seed=seed, draws=DRAWN[seed % 2])
        if rule.name in ("chain", "block"):
            chains = [RowTree.chain(0, r.tokens[1:], np.ones(len(r) - 1)) for r in tree.rows]
            for chain, r in zip(chains, tree.rows, strict=True):
                chain.draft, chain.draft_index = r.draft, r.draft_index
            tree = TokenTree(chains, torch.zeros(3, dtype=torch.int32), tree.draws)
        processors = [
            logits_process.RepetitionPenaltyLogitsProcessor(1.5),
            logits_process.TemperatureLogitsWarper(0.8),
            logits_process.TopKLogitsWarper(6),
        ]
        lazy = target(logits, processors)
        result = rule(tree, lazy, uniforms)
        by_hand = torch.zeros_like(logits)
        for b, row in enumerate(tree.rows):
            for node in range(len(row)):
                ids = torch.tensor([[b] * 3 + row.path(node)])
                scores = logits[b, node][None]
                for processor in processors:
                    scores = processor(ids, scores.clone())
                by_hand[b, node] = scores
        expected = rule(tree, target(by_hand), uniforms)
        assert torch.equal(result.nodes, expected.nodes) and torch.equal(result.bonus, expected.bonus)
        for b in range(3):
            for node, (raw, scores) in zip(result.path(b), lazy.path_scores(b, result.path(b)), strict=True):
                assert torch.equal(raw[0], logits[b, node]) and torch.equal(scores[0], by_hand[b, node])


def test_warpers_are_called_per_level_not_per_node():
    tree, logits, uniforms = make(B=8, T=64)
    calls = []

    class Counting(logits_process.TopPLogitsWarper):
        pass

    warper = logits_process.TopPLogitsWarper(0.9)
    original = logits_process.TopPLogitsWarper.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            logits_process.TopPLogitsWarper, "__call__", lambda self, i, s: calls.append(len(s)) or original(self, i, s)
        )
        accepted = SAMPLE_AND_MATCH(tree, target(logits, [warper]), uniforms)
        assert len(calls) == int(accepted.count.max()) and sum(calls) == int(accepted.count.sum())
        calls.clear()
        SAMPLE_AND_MATCH(tree, target(logits, [Counting(0.9)]), uniforms)  # a subclass may look at the text
        assert set(calls) == {1}


def test_temperature_alone_is_left_to_the_op():
    tree, logits, uniforms = make(B=20)
    warm = [logits_process.TemperatureLogitsWarper(0.5)]
    at = target(logits, warm)
    assert at.ready is None and at.scores is logits
    fused = SAMPLE_AND_MATCH(tree, at, uniforms)
    by_hand = SAMPLE_AND_MATCH(tree, target(logits / 0.5), uniforms)
    assert torch.equal(fused.nodes, by_hand.nodes) and torch.equal(fused.bonus, by_hand.bonus)
    raw, scores = at.path_scores(0, [0])[0]
    assert torch.equal(raw, logits[0, :1]) and torch.equal(scores, logits[0, :1] / 0.5)


def test_the_rule_chosen():
    def choose(rule, draws, sampling=True, processors=()):
        return choose_rule(rule, draws, sampling, [list(processors)])

    assert choose(None, DrawKind.DETERMINISTIC) is SAMPLE_AND_MATCH
    for draws in DRAWN:
        assert choose(None, draws) is TRAVERSAL
        assert choose(None, draws, processors=[logits_process.TopKLogitsWarper(5)]) is TRAVERSAL
        assert choose(None, draws, processors=[Spy()]) is MULTI_DRAFT
        assert choose("sample_and_match", draws) is SAMPLE_AND_MATCH
        with pytest.raises(ValueError, match="looks at texts that may be dropped"):
            choose("block", draws, processors=[Spy()])
    for name in ("chain", "multi_draft", "block", "traversal"):
        with pytest.raises(ValueError, match=f"rule {name} is not for drafts drawn deterministic"):
            choose(name, DrawKind.DETERMINISTIC)
    for rule in RULES.values():
        assert rule.exact != rule.name.endswith("_lossy")
        assert choose(rule, DrawKind.WITHOUT_REPLACEMENT, sampling=False) is (GREEDY if rule.exact else rule)
    with pytest.raises(ValueError, match=r"rule must be a Rule or one of greedy, sample_and_match, .*, got 'lucky'"):
        choose("lucky", DrawKind.DETERMINISTIC)
    with pytest.raises(ValueError, match="rule must not be greedy when do_sample=True"):
        choose("greedy", DrawKind.DETERMINISTIC)


def test_drafts_of_rows_are_put_together_without_copies_where_shared():
    shared, own = torch.rand(5, V), torch.rand(2, V)
    rows = [
        RowTree(np.int32([0, 1]), np.int32([-1, 0]), np.ones(2, np.float32), table, np.int32(index))
        for table, index in ((shared, [4, -1]), (own, [1, -1]), (shared, [2, -1]))
    ]
    tree = TokenTree([*rows, RowTree.root(3)], torch.zeros(4, dtype=torch.int32), DrawKind.WITH_REPLACEMENT)
    assert torch.equal(tree.draft, torch.cat([shared, own]))
    assert tree.draft_index.tolist() == [[4, -1], [6, -1], [2, -1], [-1, -1]]
    assert TokenTree(rows[::2], torch.zeros(2, dtype=torch.int32)).draft is shared
    with pytest.raises(ValueError, match="draft and draft_index must be given together"):
        RowTree(np.int32([0]), np.int32([-1]), np.ones(1, np.float32), draft=own)
    with pytest.raises(ValueError, match="draft_index must have one entry per node, 1, got 2"):
        RowTree(np.int32([0]), np.int32([-1]), np.ones(1, np.float32), own, np.int32([0, 1]))


def test_processors_that_ignore_the_text_work_row_by_row():
    """What is called once for many nodes must give what a call per node gives."""
    made = {
        "EpsilonLogitsWarper": (0.05,),
        "EtaLogitsWarper": (0.1,),
        "MinPLogitsWarper": (0.1,),
        "SuppressTokensLogitsProcessor": ([2, 5],),
        "TemperatureLogitsWarper": (0.7,),
        "TopHLogitsWarper": (0.5,),
        "TopKLogitsWarper": (4,),
        "TopPLogitsWarper": (0.8,),
        "TypicalLogitsWarper": (0.7,),
    }
    scores = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)) * 3
    for kind in _IGNORE_TEXT:
        processor = kind(*made.get(kind.__name__, ()))
        together = processor(torch.zeros(12, 1, dtype=torch.int64), scores.clone())
        for row in range(12):
            assert torch.equal(together[row], processor(torch.full((1, 7), row), scores[row : row + 1].clone())[0])
