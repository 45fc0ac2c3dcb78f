"""The kernel's write-back limits and clocks, behind `core.ports`."""

from __future__ import annotations

import os
import time

from storaged.btrfs.filesystem import kernel
from storaged.core.model import DirtyLimits
from storaged.errors import FilesystemError

VM = "/proc/sys/vm"


class ProcSysctl:
    """vm.dirty_* below `root`. Setting a limit in bytes makes the kernel zero its ratio, and the other way round."""

    def __init__(self, root: str = VM) -> None:
        self._root = root

    def dirty_limits(self) -> DirtyLimits:
        with kernel("reading the write-back limits"):
            return DirtyLimits(
                self._read("dirty_bytes"),
                self._read("dirty_background_bytes"),
                self._read("dirty_ratio"),
                self._read("dirty_background_ratio"),
            )

    def set_dirty_limits(self, limits: DirtyLimits) -> None:
        with kernel("setting the write-back limits"):
            for name, in_bytes, ratio in (
                ("dirty", limits.dirty_bytes, limits.dirty_ratio),
                ("dirty_background", limits.dirty_background_bytes, limits.dirty_background_ratio),
            ):
                if in_bytes:
                    self._write(f"{name}_bytes", in_bytes)
                else:
                    self._write(f"{name}_ratio", ratio)

    def _read(self, name: str) -> int:
        with open(f"{self._root}/{name}", "rb") as file:
            text = file.read(32)
        try:
            return int(text)
        except ValueError:
            raise FilesystemError(f"reading the write-back limits: {name} holds {text!r}, no number") from None

    def _write(self, name: str, value: int) -> None:
        fd = os.open(f"{self._root}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d\n" % value)
        finally:
            os.close(fd)


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()
