"""A thread in a mount namespace of its own: what it mounts, nobody else sees, and nothing of it stays."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

CLONE_FS, CLONE_NEWNS = 0x200, 0x20000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
Answer = TypeVar("Answer")


class MountNamespace:
    """Runs calls in the namespace; it is gone once closed."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._thread = ThreadPoolExecutor(1)
        try:
            self.run(self._enter)
        except BaseException:
            self.close()
            raise

    def _enter(self) -> None:
        self._checked(self._libc.unshare(CLONE_FS | CLONE_NEWNS))
        self._checked(self._libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))

    def _checked(self, result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def run(self, call: Callable[[], Answer]) -> Answer:
        """What `call` answers or raises inside."""
        return self._thread.submit(call).result()

    def bind(self, source: str, target: str) -> None:
        """Show `source` at `target`, inside."""
        arguments = (os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(MS_BIND | MS_REC), None)
        self.run(lambda: self._checked(self._libc.mount(*arguments)))

    def read_only(self, path: str) -> None:
        """Make `path` a mount that cannot be written to, inside."""
        self.bind(path, path)
        flags = ctypes.c_ulong(MS_REMOUNT | MS_BIND | MS_RDONLY)
        self.run(lambda: self._checked(self._libc.mount(None, os.fsencode(path), None, flags, None)))

    def mounts(self, under: str) -> list[str]:
        """The mount points below `under`, inside, each as often as something is mounted there."""

        def read() -> list[str]:
            with open("/proc/thread-self/mountinfo", encoding="utf-8") as file:
                return [point for line in file if (point := line.split()[4]).startswith(under + "/")]

        return self.run(read)

    def close(self) -> None:
        """Let it go."""
        self._thread.shutdown()
