"""Faults that a test orders: the next calls of an operation fail, or hang until they are let go."""

from __future__ import annotations

import threading
from collections import defaultdict, deque

from storaged.errors import FilesystemError


class Faults:
    """What goes wrong next, by operation."""

    def __init__(self) -> None:
        self._errors: defaultdict[str, deque[FilesystemError]] = defaultdict(deque)
        self._hangs: dict[str, threading.Event] = {}
        self.calls: defaultdict[str, int] = defaultdict(int)

    def fail(self, operation: str, error: FilesystemError, times: int = 1) -> None:
        """The next `times` calls of `operation` raise `error`."""
        self._errors[operation].extend([error] * times)

    def hang(self, operation: str) -> threading.Event:
        """Calls of `operation` block until the event that is returned is set."""
        return self._hangs.setdefault(operation, threading.Event())

    def clear(self) -> None:
        """Nothing goes wrong any more; what hangs is let go."""
        self._errors.clear()
        for event in self._hangs.values():
            event.set()
        self._hangs.clear()

    def meet(self, operation: str) -> None:
        """Called by the simulation at the start of `operation`."""
        self.calls[operation] += 1
        if (event := self._hangs.get(operation)) is not None:
            event.wait()
        if waiting := self._errors[operation]:
            raise waiting.popleft()
