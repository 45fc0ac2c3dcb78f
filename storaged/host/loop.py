"""A raw file behind a loop device: a guest that is a container, or a machine that was given the device."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from pathlib import Path

from storaged.errors import Kind
from storaged.host.images import ImageError, RawImage

_GET_STATUS64, _SET_CAPACITY = 0x4C05, 0x4C07
"""LOOP_GET_STATUS64, LOOP_SET_CAPACITY (linux/loop.h)."""
_STATUS = struct.Struct("<5Q")
"""The beginning of struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit."""
_STATUS_LENGTH = 232


def devices(path: str) -> list[str]:
    """The loop devices in front of the file at `path`. Raises ImageError when one shows but a part of it."""
    found = []
    image = os.stat(path)
    for entry in sorted(Path("/sys/block").glob("loop*/loop")):
        device = f"/dev/{entry.parent.name}"
        try:
            fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # it has gone away meanwhile
        try:
            buffer = bytearray(_STATUS_LENGTH)
            fcntl.ioctl(fd, _GET_STATUS64, buffer)
        except OSError:
            continue
        finally:
            os.close(fd)
        number, inode, _, offset, limit = _STATUS.unpack_from(buffer)
        if (number, inode) == (_encoded(image.st_dev), image.st_ino):
            if offset or limit:
                raise ImageError(f"{device} shows only a part of {path}", Kind.UNSUPPORTED)
            found.append(device)
    return found


def _encoded(device: int) -> int:
    """A device number as the kernel writes it into 64 bits (huge_encode_dev)."""
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


class LoopImage(RawImage):
    """The file is made longer or shorter, then every loop device in front of it looks anew."""

    async def check(self) -> None:
        await super().check()
        await asyncio.to_thread(self._attached)

    async def _set(self, size: int) -> None:
        await asyncio.to_thread(self._resize, size)

    async def _tell(self) -> None:
        await asyncio.to_thread(self._resize, None)

    def _resize(self, size: int | None) -> None:
        try:
            attached = self._attached()
            if size is not None:
                os.truncate(self.path, size)
            for device in attached:
                fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, _SET_CAPACITY)
                finally:
                    os.close(fd)
        except OSError as error:
            raise ImageError(f"image {self.path}: {error.strerror}") from error

    def _attached(self) -> list[str]:
        try:
            found = devices(self.path)
        except OSError as error:
            raise ImageError(f"image {self.path}: {error.strerror}") from error
        if not found:
            raise ImageError(f"image {self.path} is behind no loop device; is `control` missing?", Kind.PRECONDITION)
        return found
