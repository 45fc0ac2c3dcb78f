"""Orphans: what started programs leave behind falls to process 1, or to a subreaper, and is reaped here.

A wait status belongs to whoever started the child. So a dead child is taken only when no Popen object waits for it,
and only at the second look: between its fork and the moment the object knows its number, a child is nobody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import subprocess
from collections.abc import Iterator

log = logging.getLogger(__name__)
PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
SOON_S = 0.05
"""Several that end together cost one look."""
AGAIN_S = 1.0


def become_subreaper() -> None:
    """Have the orphans of this process' children fall to it and not to process 1. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def dead_children() -> set[int]:
    """Children of any of our threads that ended and were not waited for."""
    with contextlib.suppress(ChildProcessError):
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return set(_zombies(os.getpid()))
    return set()


def _zombies(parent: int) -> Iterator[int]:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                state, its_parent = file.read().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state == "Z" and int(its_parent) == parent:
            yield int(name)


def waited_for() -> set[int]:
    """The children of every Popen object of this process that has no status yet, asyncio's too."""
    return {
        thing.pid
        for thing in gc.get_objects()
        if isinstance(thing, subprocess.Popen) and getattr(thing, "returncode", 0) is None
    }


class Reaper:
    """Reaps orphans on the running event loop until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._first_seen: dict[int, float] = {}
        self._next: asyncio.TimerHandle | None = None
        self.reaped = 0
        """How many there were."""
        self._loop.add_signal_handler(signal.SIGCHLD, self._look_in, SOON_S)
        self._look_in(SOON_S)

    def close(self) -> None:
        """Look no more."""
        self._loop.remove_signal_handler(signal.SIGCHLD)
        if self._next is not None:
            self._next.cancel()

    def _look_in(self, seconds: float) -> None:
        at = self._loop.time() + seconds
        if self._next is not None:
            if self._next.when() <= at:
                return
            self._next.cancel()
        self._next = self._loop.call_at(at, self._look)

    def _look(self) -> None:
        self._next = None
        now = self._loop.time()
        dead = dead_children()
        seen = {pid: self._first_seen.get(pid, now) for pid in dead}
        old = {pid for pid, first in seen.items() if now - first >= AGAIN_S}
        for pid in old - waited_for() if old else ():
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    self.reaped += 1
                    del seen[pid]
        self._first_seen = seen
        if seen.keys() - old:
            self._look_in(AGAIN_S)
