"""Progress of long runs, and a way to end them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


class Monitor:
    """Shows how far a decoder is, and lets another thread, a signal handler or a callback end its run.

    A cancelled run ends after the round in hand and returns what it has: whole tokens only, caches and drafters as
    after any round, the model as before the call. An interrupt (Ctrl-C) ends a run at once, by its exception; then,
    too, the model is as before, and so is everything that the decoder keeps from call to call.

    Args:
        progress: show a bar of emitted tokens on stderr, or in a notebook.
    """

    def __init__(self, progress: bool = True) -> None:
        self.progress = progress
        self.tokens = 0  # of the run in hand, or of the last one
        self._cancelled = threading.Event()
        self._bar: tqdm | None = None

    def cancel(self) -> None:
        """Ends the run in hand. Calls that begin later are not concerned."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Since the run in hand began."""
        return self._cancelled.is_set()

    def advance(self, tokens: int) -> None:
        """A round has emitted so many; for decoders."""
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(tokens)

    def begin(self, most: int) -> None:
        """A run begins that emits so many tokens at most; for decoders."""
        self._cancelled.clear()
        self.tokens = 0
        self._bar = tqdm(total=most, unit="tok", leave=False) if self.progress else None

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def watch(monitor: Monitor | None, most: int) -> Iterator[None]:
    """A decoder's run of at most so many tokens."""
    if monitor is not None:
        monitor.begin(most)
    try:
        yield
    finally:
        if monitor is not None:
            monitor.end()
