"""Host-side data structures of branchwise (no torch); see csrc/host."""

from collections.abc import Sequence

import numpy as np

class TokenTrie:
    def __init__(
        self,
        *,
        eos: Sequence[int],
        branch_length: int,
        query_length: int,
        output_weight: float,
        max_nodes: int,
        max_output_nodes: int,
        squeeze_after: int,
    ) -> None: ...
    def begin(self, prompt: np.ndarray) -> int: ...
    def observe(self, request: int, tokens: np.ndarray) -> None: ...
    def propose(self, request: int, max_nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def end(self, request: int) -> None: ...
    def counts(self, request: int, run: Sequence[int]) -> tuple[float, float]: ...
    @property
    def num_nodes(self) -> int: ...
