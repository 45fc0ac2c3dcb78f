"""A raw file behind a loop device: a guest that is a container, or a machine that was given the device.

While the image is cut the device is limited (lo_sizelimit of LOOP_SET_STATUS64, kernel: drivers/block/loop.c): its
capacity is that of the cut image already, so the kernel refuses a larger filesystem (EFBIG) and writes behind it.
The limit carries our mark in lo_file_name, set by the same ioctl: one that a killed process left is told by it from one
that others set.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from storaged.errors import Kind
from storaged.host.images import SETTLE_S, ImageError, RawImage, undone

log = logging.getLogger(__name__)

_SET_STATUS64, _GET_STATUS64, _SET_CAPACITY = 0x4C04, 0x4C05, 0x4C07
"""LOOP_SET_STATUS64, LOOP_GET_STATUS64, LOOP_SET_CAPACITY (linux/loop.h)."""
_FLUSH = 0x1261
"""BLKFLSBUF (linux/fs.h): writes the device's cache and, from Linux 6.17 on, has a btrfs on it commit first."""
_STATUS = struct.Struct("<5Q")
"""The beginning of struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit."""
_STATUS_LENGTH = 232
_LIMIT_AT, _NAME_AT, _NAME_LENGTH = 32, 56, 64
"""lo_sizelimit; lo_file_name (LO_NAME_SIZE), which the kernel keeps for user space and never reads."""
MARK = b"storaged-host cuts:"
AGAIN_S, _AGAIN_TIMES = 0.25, 16
"""LOOP_SET_STATUS64 fails with EAGAIN while a page of the device is dirty (up to Linux 5.18); losetup does the same."""


def devices(path: str) -> dict[str, bool]:
    """The loop devices in front of the file at `path`, and whether each has a limit of ours. Raises OSError.

    Raises ImageError when one shows but a part of the file and we have not limited it.
    """
    found = {}
    image = os.stat(path)
    for entry in sorted(Path("/sys/block").glob("loop*/loop")):
        device = f"/dev/{entry.parent.name}"
        try:
            with _opened(device) as fd:
                status = _status(fd)
        except OSError:
            continue  # it has gone away meanwhile
        number, inode, _, offset, limit = _STATUS.unpack_from(status)
        if (number, inode) == (_encoded(image.st_dev), image.st_ino):
            ours = _name(status).startswith(MARK)
            if offset or (limit and not ours):
                raise ImageError(f"{device} shows only a part of {path}", Kind.UNSUPPORTED)
            found[device] = ours
    return found


@contextlib.contextmanager
def _opened(device: str) -> Iterator[int]:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _status(fd: int) -> bytearray:
    buffer = bytearray(_STATUS_LENGTH)
    fcntl.ioctl(fd, _GET_STATUS64, buffer)
    return buffer


def _name(status: bytes | bytearray) -> bytes:
    return bytes(status[_NAME_AT : _NAME_AT + _NAME_LENGTH]).split(b"\0")[0]


def _limit(device: str, path: str, size: int) -> None:
    """Have the device end at `size` bytes, with our mark; 0: at the file's end, without it. Raises OSError."""
    with _opened(device) as fd:
        status = _status(fd)
        name = _name(status)
        if size:
            name = name if name.startswith(MARK) else MARK + name
        elif name.startswith(MARK):
            kept = name.removeprefix(MARK)
            # A name that did not fit beside the mark was a path, as losetup sets it.
            name = kept if len(name) < _NAME_LENGTH - 1 else os.fsencode(path)
        struct.pack_into("<Q", status, _LIMIT_AT, size)
        struct.pack_into(f"{_NAME_LENGTH}s", status, _NAME_AT, name[: _NAME_LENGTH - 1])
        for left in range(_AGAIN_TIMES, -1, -1):
            try:
                fcntl.ioctl(fd, _SET_STATUS64, bytes(status))
                break
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(AGAIN_S)
        fcntl.ioctl(fd, _SET_CAPACITY)


def _encoded(device: int) -> int:
    """A device number as the kernel writes it into 64 bits (huge_encode_dev)."""
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


class LoopImage(RawImage):
    """The file is made longer or shorter, then every loop device in front of it looks anew."""

    linger_s = SETTLE_S

    async def check(self) -> None:
        await self.recover(cutting=False)
        await super().check()
        await asyncio.to_thread(self._attached)

    async def recover(self, *, cutting: bool) -> None:  # noqa: ARG002  # the mark says it
        await asyncio.to_thread(self._recover)

    @contextlib.asynccontextmanager
    async def _held(self, size: int) -> AsyncIterator[None]:
        async with undone(lambda: asyncio.to_thread(self._limit, 0)):
            await asyncio.to_thread(self._limit, size)
            yield

    async def _flush(self) -> None:
        await asyncio.to_thread(self._flush_devices)
        await super()._flush()

    async def _set(self, size: int) -> None:
        await asyncio.to_thread(self._resize, size)

    async def _tell(self) -> None:
        await asyncio.to_thread(self._resize, None)

    def _resize(self, size: int | None) -> None:
        with self._told():
            attached = self._attached()
            if size is not None:
                os.truncate(self.path, size)
            for device in attached:
                with _opened(device) as fd:
                    fcntl.ioctl(fd, _SET_CAPACITY)

    def _limit(self, size: int) -> None:
        with self._told():
            for device, ours in self._attached().items():
                if not size and not ours:
                    continue
                try:
                    _limit(device, self.path, size)
                except OSError as error:
                    if not size:
                        raise ImageError(
                            f"the limit that the cut of {self.path} had put on {device} is still there: "
                            f"{error.strerror}; the next resize, or start of storaged-host, removes it"
                        ) from error
                    if error.errno != errno.EBUSY:
                        raise
                    raise ImageError(
                        f"the kernel refuses to limit {device} while it is in use, so {self.path} cannot be cut safely",
                        Kind.UNSUPPORTED,
                    ) from error

    def _recover(self) -> None:
        with self._told():
            for device, ours in devices(self.path).items():
                if ours:
                    _limit(device, self.path, 0)
                    log.info("%s: the limit that an interrupted cut of %s left is removed", device, self.path)

    def _flush_devices(self) -> None:
        with self._told():
            for device in self._attached():
                with _opened(device) as fd:
                    fcntl.ioctl(fd, _FLUSH)
                    os.fsync(fd)

    def _attached(self) -> dict[str, bool]:
        with self._told():
            found = devices(self.path)
        if not found:
            raise ImageError(f"image {self.path} is behind no loop device; is `control` missing?", Kind.PRECONDITION)
        return found

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ImageError(f"image {self.path}: {error.strerror}") from error
