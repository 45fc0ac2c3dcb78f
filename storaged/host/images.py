"""A guest's image, as whoever runs its machine lets it be resized. Only raw files: what is in them can be read.

Growing leaves a hole, cutting gives blocks back; neither writes a byte. No image is cut below the filesystem in it,
whatever anybody says. A check before the cut is not enough, because the guest can grow its filesystem between the two.
So the guest is kept from that first (`_held`: its device is made smaller, or its machine is stopped), then what is
under way is flushed, then the superblock is read, then the file is cut, then the superblock is read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from storaged.errors import Kind, StoragedError
from storaged.host import superblock

log = logging.getLogger(__name__)

WITHIN_S = 10.0
"""A machine's monitor that does not answer for this long is taken for hung."""
SETTLE_S = 0.5
"""A commit that was under way when a guest was kept from growing has this long to end: before the check that precedes
the cut where the guest runs on, before the last one where its machine was stopped."""

Between = Callable[[str], Awaitable[None]]
"""Called between two steps of a cut with the name of the one that has ended: for tests."""
_T = TypeVar("_T")


class ImageError(StoragedError):
    """The image, or who holds it, does not do it; what it did is asked for afterwards."""

    kind = Kind.UNAVAILABLE


class WouldCut(ImageError):
    """The filesystem is larger than what should be left of the image. The message says what became of the image."""

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
        """Make it at most `size` large; raises WouldCut rather than cut the filesystem.

        A caller that is cancelled waits until the guest's device or machine is as it was.
        """
        ...

    async def filesystem_size(self) -> int:
        """The filesystem's bytes, read from the image."""
        ...

    async def recover(self, *, cutting: bool) -> None:
        """Undo what a process that was killed in `shrink` left: a limit on the device, a stopped machine.

        `cutting`: the journal says that it was cutting. What others limited or stopped stays so.
        """
        ...


async def nothing(step: str) -> None:
    """The seam between two steps, unless a test has another."""


class RawImage:
    """What all backends share: the file itself, and the order of every cut. `_set` does it, `_held` makes it safe."""

    linger_s = 0.0
    """Seconds between keeping the guest from growing and the check before the cut, where the guest runs on."""
    settle_s = SETTLE_S
    """Seconds from the end of a cut to the last check."""

    def __init__(self, path: str, between: Between = nothing) -> None:
        self.path = path
        self._between = between

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

    async def recover(self, *, cutting: bool) -> None:
        pass

    async def grow(self, size: int) -> int:
        await self.recover(cutting=False)
        if await self.size() < size:
            await self._set(size)
        else:
            await self._tell()  # a killed daemon may have grown it and told nobody
        return await self._durable(least=size)

    async def shrink(self, size: int) -> int:
        return await unbroken(self._shrink(size))

    async def _shrink(self, size: int) -> int:
        await self.recover(cutting=False)
        had = await self.size()
        if had > size:
            filesystem = await self.filesystem_size()
            if size < filesystem:
                raise WouldCut(f"image {self.path} is not cut to {size} bytes: its filesystem has {filesystem}")
            await self._step("checked")
            async with self._held(size):
                await self._step("held")
                await self._cut(size, had)
            await self._step("released")
            await asyncio.sleep(self.settle_s)
        else:
            await self._tell()
        await self._confirm(size, had)
        return await self._durable(most=size)

    async def _cut(self, size: int, had: int) -> None:
        """With the guest kept from growing: flush, check, cut, check."""
        await asyncio.sleep(self.linger_s)
        await self._flush()
        await self._step("flushed")
        filesystem = await self.filesystem_size()
        if size < filesystem:
            raise WouldCut(
                f"image {self.path} was not cut to {size} bytes and keeps its {had}: "
                f"its filesystem grew to {filesystem} before the guest could be kept from it"
            )
        await self._step("read")
        await self._set(size)
        await self._step("cut")
        await self._confirm(size, had)
        await self._step("confirmed")

    async def _confirm(self, size: int, had: int) -> None:
        """Look again after a cut; a filesystem that does not fit gets its room back, and WouldCut is raised."""
        now = min(size, had)
        was = f"image {self.path} {'was cut to' if had > size else 'had'} {now} bytes"
        try:
            await self._flush()
            filesystem = await self.filesystem_size()
        except ImageError as error:
            raise ImageError(f"{was} and cannot be checked: {error.message}", error.kind) from error
        if filesystem <= now:
            return
        back = max(had, filesystem)
        try:
            await self._set(back)
            await self._flush()
        except ImageError as error:
            raise WouldCut(
                f"{was}, its filesystem has {filesystem}, and it could not be made {back} again: {error.message}"
            ) from error
        raise WouldCut(
            f"{was} and has {back} again: its filesystem has grown to {filesystem}; what the guest had written "
            f"behind {now} reads as zeros"
        )

    async def _step(self, name: str) -> None:
        await self._between(name)

    async def _durable(self, least: int = 0, most: int | None = None) -> int:
        await asyncio.to_thread(_sync, self.path)
        size = await self.size()
        if size < least or (most is not None and size > most):
            raise ImageError(f"image {self.path} has {size} bytes, not {least if most is None else most}")
        return size

    @contextlib.asynccontextmanager
    async def _held(self, size: int) -> AsyncIterator[None]:  # noqa: ARG002  # for a backend with a device to limit
        """Within it the guest cannot grow its filesystem beyond `size`; behind it everything is as it was."""
        yield

    async def _flush(self) -> None:
        """What the guest has written, and what it is committing, is in the file."""
        await asyncio.to_thread(_sync, self.path)

    async def _set(self, size: int) -> None:
        raise NotImplementedError

    async def _tell(self) -> None:
        """Let the guest's kernel know the size that the file has, once more."""


async def unbroken(work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`, to its end also when the caller is cancelled meanwhile; then the cancellation takes effect."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s", error)
        raise


@contextlib.asynccontextmanager
async def undone(undo: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Await `undo()` behind the block, whatever happens in it. When both fail, one ImageError says both."""
    try:
        yield
    except StoragedError as error:
        try:
            await undo()
        except StoragedError as second:
            raise ImageError(f"{error.message}; and then {second.message}", error.kind) from error
        raise
    except BaseException:
        await undo()
        raise
    await undo()


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
