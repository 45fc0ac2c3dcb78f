"""A guest's image, as whoever runs its machine lets it be resized. Only raw files: what is in them can be read.

Growing leaves a hole, cutting gives blocks back; neither writes a byte. No image is cut below the filesystem in it,
whatever anybody says: its superblock is read right before the cut, and once more after.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Awaitable, Callable
from typing import Protocol

from storaged.errors import Kind, StoragedError
from storaged.host import superblock

WITHIN_S = 10.0
"""A machine's monitor that does not answer for this long is taken for hung."""


class ImageError(StoragedError):
    """The image, or who holds it, does not do it; what it did is asked for afterwards."""

    kind = Kind.UNAVAILABLE


class WouldCut(ImageError):
    """The filesystem is larger than what should be left of the image; nothing was cut."""

    kind = Kind.PRECONDITION


class ImageBackend(Protocol):
    """One image. Everything raises ImageError; nothing blocks the event loop."""

    async def check(self) -> None:
        """Raises when it could not be resized: nobody holds it, it is not raw, the machine does not answer."""
        ...

    async def size(self) -> int:
        """Bytes that the guest's disk has."""
        ...

    async def grow(self, size: int) -> int:
        """Make it at least `size` large; its size, durably, and the guest's kernel is told."""
        ...

    async def shrink(self, size: int) -> int:
        """Make it at most `size` large; raises WouldCut rather than cut the filesystem."""
        ...

    async def filesystem_size(self) -> int:
        """The filesystem's bytes, read from the image."""
        ...


class RawImage:
    """What all backends share: the file itself, and the guard around every cut. `_set` does it."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def check(self) -> None:
        await self.filesystem_size()

    async def size(self) -> int:
        return await asyncio.to_thread(_length, self.path)

    async def filesystem_size(self) -> int:
        try:
            return (await asyncio.to_thread(superblock.read, self.path)).size
        except OSError as error:
            raise ImageError(f"image {self.path}: {error.strerror}") from error
        except superblock.NoFilesystem as error:
            raise ImageError(f"image {self.path}: {error.message}", error.kind) from error

    async def grow(self, size: int) -> int:
        if await self.size() < size:
            await self._set(size)
        else:
            await self._tell()  # a killed daemon may have grown it and told nobody
        return await self._durable(least=size)

    async def shrink(self, size: int) -> int:
        had = await self.size()
        await self._guard(size)
        if had > size:
            await self._set(size)
            try:
                await self._guard(size)
            except ImageError:
                # It grew at the same moment. What lay behind the cut was not written yet: give the room back.
                await self._set(had)
                raise
        else:
            await self._tell()
        return await self._durable(most=size)

    async def _guard(self, size: int) -> None:
        filesystem = await self.filesystem_size()
        if size < filesystem:
            raise WouldCut(f"image {self.path} is not cut to {size} bytes: its filesystem has {filesystem}")

    async def _durable(self, least: int = 0, most: int | None = None) -> int:
        await asyncio.to_thread(_sync, self.path)
        size = await self.size()
        if size < least or (most is not None and size > most):
            raise ImageError(f"image {self.path} has {size} bytes, not {least if most is None else most}")
        return size

    async def _set(self, size: int) -> None:
        raise NotImplementedError

    async def _tell(self) -> None:
        """Let the guest's kernel know the size that the file has, once more."""


def _length(path: str) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ImageError(f"image {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"image {path} is not a file", Kind.UNSUPPORTED)
    return status.st_size


def _sync(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"image {path}: {error.strerror}") from error


def known(path: str) -> tuple[int | None, int | None]:
    """The sizes of the image and of the filesystem in it, as far as they can be read; blocks."""
    image = filesystem = None
    with contextlib.suppress(ImageError):
        image = _length(path)
    with contextlib.suppress(OSError, superblock.NoFilesystem):
        filesystem = superblock.read(path).size
    return image, filesystem


async def within(call: Callable[[], Awaitable[None]], who: str) -> None:
    """Await `call()`; raises ImageError when it takes too long or the connection breaks."""
    try:
        async with asyncio.timeout(WITHIN_S):
            await call()
    except TimeoutError as error:
        raise ImageError(f"{who} did not answer within {WITHIN_S:g} s") from error
    except OSError as error:
        raise ImageError(f"{who}: {error.strerror or type(error).__name__}") from error


def make_backend(control: str, path: str, disk: str) -> ImageBackend:
    """The backend that `[guest.NAME] control` names: `loop`, `qmp:/socket`, `crosvm:/socket`."""
    kind, _, socket = control.partition(":")
    if kind == "qmp":
        from storaged.host.qmp import QmpImage

        return QmpImage(path, socket, disk)
    if kind == "crosvm":
        from storaged.host.crosvm import CrosvmImage

        return CrosvmImage(path, socket, int(disk or 0))
    from storaged.host.loop import LoopImage

    return LoopImage(path)
