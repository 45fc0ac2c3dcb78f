"""The filesystem's space at scrape time: fresh when the kernel answers at once, else as it was known."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass

from storaged.core.model import Space
from storaged.errors import StoragedError
from storaged.runtime import StorageService

PATIENCE_S = 0.003
"""A scrape waits this long for the kernel. Its accounting lies in memory: this is only ever reached by a stall."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the filesystem said."""

    space: Space
    discard: bool


class SpaceReader:
    """Reads in a thread of its own, one read at a time: a disk that hangs holds up neither a scrape nor the engine.

    A read takes the kernel's accounting (sysfs, the device's size, the mount's flags): no commit, no tree, no lock
    that a resize holds while it moves data.
    """

    def __init__(self, storage: StorageService) -> None:
        self._storage = storage
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._lock = threading.Lock()
        self._under_way: Future[Reading] | None = None
        self._known: tuple[int, Reading] | None = None

    def latest(self) -> Reading:
        """Fresh if that takes no longer than PATIENCE_S; else the newer of the last reading and what was published."""
        published = self._storage.snapshot
        with self._lock:
            reading = self._under_way
            if reading is None or reading.done():
                reading = self._under_way = self._thread.submit(self._read)
        try:
            answer = reading.result(PATIENCE_S)
        except (TooLate, StoragedError, OSError):
            known = self._known
            if known is not None and known[0] == published.sequence:
                return known[1]
            return Reading(published.space, known[1].discard if known is not None else True)
        self._known = (published.sequence, answer)
        return answer

    def _read(self) -> Reading:
        filesystem = self._storage.world.filesystem
        return Reading(filesystem.space(), filesystem.discard_supported())

    def close(self) -> None:
        """Read no more; a read that hangs is left alone."""
        self._thread.shutdown(wait=False, cancel_futures=True)
