"""A guest and an image without a kernel: what lasts passes through one place, where a test can break it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from storaged.errors import Kind, StoragedError
from storaged.host import superblock
from storaged.host.guests import Refused, ResizeStatus
from storaged.host.images import ImageBackend, RawImage
from storaged.host.resizes import Resizes, World
from storaged.host.saga_model import Saga
from storaged.host.settings import Resizing
from storaged.rpc.proto import storaged_v1_pb2
from storaged.units import GIB

SMALL, LARGE = 2 * GIB, 4 * GIB
_T = TypeVar("_T")


def write_superblock(path: Path, size: int) -> None:
    """As a btrfs commits its size."""
    block = bytearray(superblock.LENGTH)
    struct.pack_into("<QQ8s", block, 0x30, superblock.AT, 0, superblock.MAGIC)
    struct.pack_into("<Q", block, 0x70, size)
    struct.pack_into("<Q", block, 0x88, 1)
    struct.pack_into("<Q", block, 0xD1, size)
    struct.pack_into("<I", block, 0, superblock.crc32c(bytes(block[32:])))
    with path.open("r+b") as file:
        file.seek(superblock.AT)
        file.write(block)


class Bench:
    """An image, a guest in it, and what happens at the n-th call that anybody makes of either."""

    def __init__(self, directory: Path, size: int) -> None:
        self.path = directory / "g.img"
        with self.path.open("wb") as file:
            file.truncate(size)
        write_superblock(self.path, size)
        self.settings = Resizing(state_dir=str(directory / "state"), patience_s=0.2, capacity_s=0.2, poll_s=0.002)
        self.told: list[int] = []
        self.calls = 0
        self.at = -1
        self.before: Callable[[str], object] = lambda _: None
        self.after: Callable[[str], object] = lambda _: None
        self.guest = Guest(self)
        self.backend = Image(self)
        self.runs = True
        self.room: int | None = 100 * GIB
        self.claims: list[int] = []
        self.short = 0
        self.resizes = self.new()

    def new(self) -> Resizes:
        world = World(
            self._image,
            lambda _: self.guest if self.runs else None,
            self._sized,
            lambda: None,
            self._room,
            self._claim,
            lambda _: self.short,
        )
        self.resizes = Resizes("p", self.settings, world)
        return self.resizes

    def _image(self, name: str) -> tuple[str, ImageBackend]:
        if name != "g":
            raise StoragedError("no such guest", Kind.NOT_FOUND)
        return str(self.path), self.backend

    def _room(self) -> int:
        if self.room is None:
            raise StoragedError("the pool was not looked at yet", Kind.UNAVAILABLE)
        return self.room

    def _claim(self, _: str, size: int) -> None:
        self.claims.append(size)

    def _sized(self, _: str, size: int) -> None:
        self.told.append(size)

    def sizes(self) -> tuple[int, int]:
        image, filesystem = self.path.stat().st_size, superblock.read(str(self.path)).size
        assert image >= filesystem
        return image, filesystem

    async def call(self, what: str, work: Callable[[], Awaitable[_T]]) -> _T:
        """Every call passes here."""
        self.sizes()
        mine = self.calls
        self.calls += 1
        if mine == self.at:
            await asyncio.sleep(0)
            self.before(what)
            await asyncio.sleep(0)
        answer = await work()
        self.sizes()
        if mine == self.at:
            self.after(what)
            await asyncio.sleep(0)
        return answer

    async def moves(self) -> None:
        """Until the image or the filesystem has another size than now."""
        before = self.sizes()
        async with asyncio.timeout(60):
            while True:
                if self.sizes() != before:
                    return
                await asyncio.sleep(0)

    async def ends(self, wanted: str) -> Saga:
        async with asyncio.timeout(60):
            while True:
                saga = next(each for each in self.resizes.snapshot if each.id == wanted)
                if not saga.active:
                    return saga
                await asyncio.sleep(0.002)


class Guest:
    """An agent whose filesystem takes a few questions to be resized."""

    report: storaged_v1_pb2.Report | None = None

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.target = 0
        self.left = 0
        self.stopped = False
        self.least = GIB
        self.blind = False

    def _size(self) -> int:
        return superblock.read(str(self._bench.path)).size

    async def resize_status(self) -> ResizeStatus:
        return await self._bench.call("status", self._status)

    async def _status(self) -> ResizeStatus:
        if self.left:
            self.left -= 1
            size = self._size()
            if not self.left:
                size = self.target
            elif self.target < size:
                size -= (size - self.target) // 8 * 4096 // 4096
            if size <= self._bench.path.stat().st_size:
                write_superblock(self._bench.path, size)
        return ResizeStatus(bool(self.left), self._size(), self.target)

    async def resize(self, size: int) -> bool:
        async def work() -> bool:
            if self.left:
                return False
            self.target, self.left, self.stopped = size, 4, False
            return True

        return await self._bench.call("resize", work)

    async def cancel_resize(self) -> None:
        async def work() -> None:
            if not self.left:
                raise Refused("no job is active")
            self.left, self.stopped = 0, True

        await self._bench.call("cancel", work)

    async def minimum(self) -> int:
        async def work() -> int:
            return self.least

        return await self._bench.call("minimum", work)

    async def fresh_report(self) -> storaged_v1_pb2.Report | None:
        async def work() -> storaged_v1_pb2.Report:
            report = storaged_v1_pb2.Report()
            report.filesystem.device_bytes = 1 if self.blind else self._bench.path.stat().st_size
            report.job.requested_size = self.target
            report.job.reason = "cancelled" if self.stopped else "no room"
            return report

        return await self._bench.call("report", work)


class Image(RawImage):
    """A file that nobody shows."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(str(bench.path))
        self._bench = bench

    async def grow(self, size: int) -> int:
        return await self._bench.call("grow", lambda: super(Image, self).grow(size))

    async def shrink(self, size: int) -> int:
        return await self._bench.call("shrink", lambda: super(Image, self).shrink(size))

    async def filesystem_size(self) -> int:
        return await self._bench.call("filesystem_size", super().filesystem_size)

    async def _set(self, size: int) -> None:
        os.truncate(self.path, size)


@contextlib.asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(bench.resizes.run())
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
