"""Preallocated extents of applications, in every way they come about, and how their owners write them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path

from storaged.units import MIB

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
BLOCK = MIB
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes. Raises OSError."""
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@dataclass(slots=True)
class Unwritten:
    """One preallocated range of a file and what of it is still unwritten."""

    path: Path
    offset: int
    length: int
    _done: int = field(default=0)

    @property
    def left(self) -> int:
        """Bytes still unwritten."""
        return self.length - self._done

    def write(self, most: int | None = None) -> int:
        """Write it as its owner would, up to `most` bytes or an error; bytes written.

        Small ranges are not followed by fsync(2): 20,000 log trees would be what makes the image grow.
        """
        data = os.urandom(min(BLOCK, self.length))
        begun = self._done
        end = self.length if most is None else min(self.length, begun + most)
        try:
            fd = os.open(self.path, os.O_WRONLY)
        except OSError:
            return 0
        try:
            with contextlib.suppress(OSError):
                while self._done < end:
                    part = min(len(data), end - self._done)
                    self._done += os.pwrite(fd, data[:part], self.offset + self._done)
            if self.length >= BLOCK:
                with contextlib.suppress(OSError):
                    os.fsync(fd)
        finally:
            os.close(fd)
        return self._done - begun


def left(parts: list[Unwritten]) -> int:
    """Bytes still unwritten in all of them."""
    return sum(part.left for part in parts)


def preallocate(path: Path, length: int, mode: int = 0, offset: int = 0) -> Unwritten:
    """Preallocate a range of a file, which is made where it is missing, and commit it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fallocate(fd, mode, offset, length)
        os.fsync(fd)
    finally:
        os.close(fd)
    return Unwritten(path, offset, length)


def punch(path: Path, offset: int, length: int) -> None:
    """Punch a hole."""
    fd = os.open(path, os.O_RDWR)
    try:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
    finally:
        os.close(fd)
