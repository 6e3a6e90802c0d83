"""The target guesses ahead of itself while it verifies: Jacobi iteration, and lookahead decoding with its n-gram pool
(card ar-parallel-decoding)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ..tree import DrawKind, RowTree
from .base import DraftRequest, Needs, Verified


class Jacobi:
    """A chain of the tokens that the target predicted behind its last, wrong guess (Santilli et al. 2023, arXiv
    2305.10427).

    Args:
        length: tokens of the chain.

    Raises:
        ValueError: ``length`` below 1.
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.LOGITS

    def __init__(self, length: int = 7) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = length

    def begin(self, request: DraftRequest) -> JacobiSession:
        return JacobiSession(self.length, request)


class JacobiSession:
    def __init__(self, length: int, request: DraftRequest) -> None:
        self._length = length
        self._fillers = _fillers(request)
        self._last = [int(prompt[-1]) for prompt in request.prompts]
        self._guesses: list[list[int]] = [[] for _ in request.prompts]
        self._eos = request.eos

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        trees = []
        for b, budget in enumerate(budgets):
            n = min(self._length, budget - 1)
            guess = self._guesses[b][:n]
            guess += [self._fillers[b].token() for _ in range(n - len(guess))]
            tree = RowTree.chain(self._last[b], guess, 0.3 ** np.arange(1, n + 1))
            tree.fixed = len(tree)  # what the target says behind a wrong guess is the next guess
            trees.append(tree)
        return trees

    def observe(self, verified: Verified) -> None:
        for b, tokens in enumerate(verified.emitted):
            if tokens:
                self._last[b] = tokens[-1]
            if verified.logits is None or verified.tree is None:
                continue
            said = verified.logits[b, : len(verified.tree.rows[b])].argmax(-1).tolist()
            # Behind the first wrong guess, which is the node after the accepted path.
            guess = said[len(verified.path(b)) :]
            self._guesses[b] = [self._fillers[b].token() if token in self._eos else token for token in guess]

    def keep(self, rows: Sequence[int]) -> None:
        for name in ("_fillers", "_last", "_guesses"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def close(self) -> None: ...


class Lookahead:
    """Lookahead decoding (Fu et al. 2024, arXiv 2402.02057): in one forward, a window of Jacobi iterations collects
    n-grams, and the n-grams collected for the last token are verified.

    The window's nodes form a tree below the last token, so all of it is one token tree; a window that does not fit the
    budget gets fewer columns. Only pays where a forward of ``(window + guesses) * (ngram - 1)`` tokens costs little
    more than one of a single token: not on CPUs.

    Args:
        window: columns, W.
        ngram: length of the n-grams, N.
        guesses: n-grams kept and verified per token, G.
        prompt: collect the prompt's own n-grams, too.

    Raises:
        ValueError: ``window`` or ``guesses`` below 1, ``ngram`` below 2.
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.LOGITS

    def __init__(self, window: int = 7, ngram: int = 5, guesses: int = 7, prompt: bool = True) -> None:
        if window < 1 or guesses < 1 or ngram < 2:
            raise ValueError(
                f"window and guesses must be at least 1 and ngram at least 2, got {window}, {guesses} and {ngram}"
            )
        self.window, self.ngram, self.guesses, self.prompt = window, ngram, guesses, prompt

    def begin(self, request: DraftRequest) -> LookaheadSession:
        return LookaheadSession(self, request)


class LookaheadSession:
    def __init__(self, options: Lookahead, request: DraftRequest) -> None:
        self._rows = [
            _LookaheadRow(options, prompt, filler, request.eos)
            for prompt, filler in zip(request.prompts, _fillers(request), strict=True)
        ]

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        return [row.propose(budget) for row, budget in zip(self._rows, budgets, strict=True)]

    def observe(self, verified: Verified) -> None:
        for b, (row, tokens) in enumerate(zip(self._rows, verified.emitted, strict=True)):
            if verified.logits is not None and verified.tree is not None:
                tree = verified.tree.rows[b]
                row.slide(tree, verified.logits[b, : len(tree)].argmax(-1).tolist())
            row.last = tokens[-1] if tokens else row.last

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def close(self) -> None: ...


class _LookaheadRow:
    def __init__(self, options: Lookahead, prompt: np.ndarray, filler: _Filler, eos: frozenset[int]) -> None:
        self._options, self._filler, self._eos = options, filler, eos
        self.last = int(prompt[-1])
        # Levels of the window, [N - 1][W]; column 0 of level 0 stands for the last token.
        self._levels = [[filler.token() for _ in range(options.window)] for _ in range(options.ngram - 1)]
        self._pool: dict[int, OrderedDict[tuple[int, ...], None]] = {}
        self._window: list[int] = []  # of the last proposal: the nodes of the last level
        if options.prompt:
            text = prompt.tolist()
            for i in range(len(text) - options.ngram + 1):
                self._collect(text[i], tuple(text[i + 1 : i + options.ngram]))

    def propose(self, budget: int) -> RowTree:
        tokens, parents, scores = [self.last], [-1], [1.0]
        known: dict[tuple[int, int], int] = {}

        def add(parent: int, token: int, score: float) -> int:
            at = known.setdefault((parent, token), len(tokens))
            if at == len(tokens):
                tokens.append(token)
                parents.append(parent)
                scores.append(min(score, scores[parent]))
            return at

        depth = self._options.ngram - 1
        columns = min(self._options.window, budget // depth)
        self._levels[0][0] = self.last
        self._window = []
        if columns >= 1:
            column = [0]
            for i in range(1, columns):
                column.append(add(column[-1], self._levels[0][i], 0.02))
            for level in range(1, depth):
                column = [add(column[i], self._levels[level][i], 0.02) for i in range(columns)]
            self._window = column
        fixed = len(tokens)
        for grams in reversed(self._pool.get(self.last, {})):  # latest first
            node = 0
            for i, token in enumerate(grams):
                if (node, token) not in known and len(tokens) >= budget:
                    break
                node = add(node, token, 0.5 * 0.7**i)
        n = len(tokens)
        return RowTree(
            np.array(tokens, np.int32),
            np.array(parents, np.int32),
            np.array(scores, np.float32),
            ids=np.arange(n, dtype=np.int32),
            fixed=fixed,
        )

    def slide(self, tree: RowTree, said: list[int]) -> None:
        """Collects the n-grams that the window completed, and moves it on."""
        place = {} if tree.ids is None else {int(name): node for node, name in enumerate(tree.ids)}
        if not self._window or any(node not in place for node in self._window):
            return
        new = [said[place[node]] for node in self._window]
        for i, token in enumerate(new):
            self._collect(self._levels[0][i], (*(level[i] for level in self._levels[1:]), token))
        new = [self._filler.token() if token in self._eos else token for token in new]
        missing = self._options.window - len(new)
        self._levels = [*self._levels[1:], new + [self._filler.token() for _ in range(missing)]]

    def _collect(self, first: int, rest: tuple[int, ...]) -> None:
        if self._eos.intersection(rest):
            return
        grams = self._pool.setdefault(first, OrderedDict())
        grams.pop(rest, None)
        grams[rest] = None
        if len(grams) > self._options.guesses:
            grams.popitem(last=False)


class _Filler:
    """Tokens of the prompt in random order, to start guessing from."""

    def __init__(self, prompt: np.ndarray, eos: frozenset[int]) -> None:
        self._rng = np.random.default_rng(len(prompt))
        tokens = [token for token in prompt.tolist() if token not in eos]
        self._tokens = tokens or [next(t for t in range(len(eos) + 1) if t not in eos)]

    def token(self) -> int:
        return int(self._tokens[self._rng.integers(len(self._tokens))])


def _fillers(request: DraftRequest) -> list[_Filler]:
    return [_Filler(prompt, request.eos) for prompt in request.prompts]
