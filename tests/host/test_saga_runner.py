"""The runner, with a guest and an image that fail, die and are cancelled at every single call."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.host import superblock
from storaged.host.guests import Lost, Refused, ResizeStatus
from storaged.host.images import ImageBackend, ImageError, RawImage
from storaged.host.journal import Journal
from storaged.host.resizes import Resizes, World
from storaged.host.saga_model import Outcome, Saga, Stage
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
        self.resizes = self.new()

    def new(self) -> Resizes:
        world = World(self._image, lambda _: self.guest if self.runs else None, self._sized, lambda: None)
        self.resizes = Resizes("p", self.settings, world)
        return self.resizes

    def _image(self, name: str) -> tuple[str, ImageBackend]:
        if name != "g":
            raise StoragedError("no such guest", Kind.NOT_FOUND)
        return str(self.path), self.backend

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

    async def ends(self, wanted: str) -> Saga:
        async with asyncio.timeout(20):
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


BOTH = pytest.mark.parametrize(("start", "to"), [(SMALL, LARGE), (LARGE, SMALL)], ids=["grow", "shrink"])


@BOTH
async def test_undisturbed(tmp_path: Path, start: int, to: int) -> None:
    bench = Bench(tmp_path, start)
    async with running(bench):
        saga = await bench.ends((await bench.resizes.begin("g", to + 17)).id)
    assert (saga.outcome, saga.reason, saga.to) == (Outcome.DONE, "", to)
    assert bench.sizes() == (to, to)
    assert bench.told == [to]
    assert [each.id for each in Journal(f"{tmp_path}/state/resizes-p.json").load()] == [saga.id]


def _breaks(what: str) -> None:
    if what in {"grow", "shrink", "filesystem_size"}:
        raise ImageError("broken on purpose")
    raise Lost("broken on purpose")


def _refuses(what: str) -> None:
    if what in {"grow", "shrink", "filesystem_size"}:
        raise ImageError("broken on purpose")
    raise Refused("broken on purpose")


@BOTH
@pytest.mark.parametrize("breaks", [_breaks, _refuses], ids=["lost", "refused"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_failure_at_every_call(
    tmp_path: Path, start: int, to: int, breaks: Callable[[str], None], after: bool
) -> None:
    failed = 0
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        bench.at = at
        if after:
            bench.after = breaks
        else:
            bench.before = breaks
        async with running(bench):
            try:
                begun = await bench.resizes.begin("g", to)
            except StoragedError:
                assert bench.sizes() == (start, start), "nothing had begun"
                continue
            saga = await bench.ends(begun.id)
            image, filesystem = bench.sizes()
            if saga.outcome is Outcome.DONE:
                assert (image, filesystem) == (to, to)
            else:
                failed += 1
                assert saga.outcome is Outcome.FAILED
                assert "broken on purpose" in saga.reason
                assert (saga.image, saga.filesystem) == (image, filesystem), "it says what is true"
                assert f"({image} bytes), the filesystem" in saga.reason
            if bench.calls <= at:
                break
            bench.at = -1
            bench.guest.left = 0
            again = await bench.ends((await bench.resizes.begin("g", to)).id)
            assert again.outcome is Outcome.DONE, "nothing that failed stands in the way"
            assert bench.sizes() == (to, to)
    assert failed >= 3


@BOTH
async def test_a_guest_that_dies_at_every_call(tmp_path: Path, start: int, to: int) -> None:
    failed = 0
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        bench.at = at
        bench.before = lambda _, bench=bench: setattr(bench, "runs", False)  # type: ignore[misc]
        async with running(bench):
            try:
                saga = await bench.ends((await bench.resizes.begin("g", to)).id)
            except StoragedError:
                continue
        if bench.calls <= at:
            break
        image, filesystem = bench.sizes()
        failed += saga.outcome is Outcome.FAILED
        assert (saga.image, saga.filesystem) == (image, filesystem) or saga.outcome is Outcome.DONE
    assert failed >= 4


@BOTH
async def test_a_cancel_at_every_call(tmp_path: Path, start: int, to: int) -> None:
    outcomes = []
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        bench.at = at
        asked: list[asyncio.Task[Saga]] = []

        def cancel(_: str, bench: Bench = bench, asked: list[asyncio.Task[Saga]] = asked) -> None:
            asked.append(asyncio.create_task(bench.resizes.cancel("", "g")))

        bench.before = cancel
        async with running(bench):
            saga = await bench.ends((await bench.resizes.begin("g", to)).id)
            told = await asyncio.gather(*asked, return_exceptions=True)
            refused = bool(told) and isinstance(told[0], StoragedError)
        if bench.calls <= at:
            break
        if refused:
            assert saga.outcome is Outcome.DONE
            continue
        outcomes.append(saga.outcome)
        assert bench.sizes() == ((start, start) if saga.outcome is Outcome.CANCELLED else (to, to)), (at, saga)
    assert outcomes.count(Outcome.CANCELLED) >= 4
    assert set(outcomes) <= {Outcome.CANCELLED, Outcome.DONE}


@BOTH
async def test_an_end_at_every_call_is_taken_up_again(tmp_path: Path, start: int, to: int) -> None:
    resumed = 0
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        bench.at = at
        async with running(bench) as task:
            bench.before = lambda _, task=task: task.cancel()  # type: ignore[misc]
            begun = await bench.resizes.begin("g", to)
            ends = asyncio.create_task(bench.ends(begun.id))
            await asyncio.wait({task, ends}, return_when=asyncio.FIRST_COMPLETED)
            ends.cancel()
        if bench.calls <= at:
            break
        bench.new()
        async with running(bench):
            ended = await bench.ends(begun.id)
        resumed += ended.resumed
        assert ended.outcome is Outcome.DONE, ended
        assert bench.sizes() == (to, to)
    assert resumed >= 4


async def test_a_disk_that_takes_no_journal_stops_it_before_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Journal.save
    saved = 0

    def full(journal: Journal, known: Any) -> None:
        nonlocal saved
        saved += 1
        if saved > 3:
            raise OSError(28, "No space left on device")
        save(journal, known)

    monkeypatch.setattr(Journal, "save", full)
    bench = Bench(tmp_path, SMALL)
    async with running(bench):
        saga = await bench.ends((await bench.resizes.begin("g", LARGE)).id)
        assert saga.outcome is Outcome.FAILED
        assert "No space left" in saga.reason
        with pytest.raises(StoragedError, match="No space left"):
            await bench.resizes.begin("g", LARGE)
    bench.sizes()


async def test_what_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    async with running(bench):
        with pytest.raises(InvalidRequest):
            await bench.resizes.begin("g", 4096)
        with pytest.raises(StoragedError, match="no such guest"):
            await bench.resizes.begin("other", SMALL)
        bench.guest.least = 3 * GIB
        with pytest.raises(StoragedError, match="below the least") as refused:
            await bench.resizes.begin("g", SMALL)
        assert refused.value.kind is Kind.OUT_OF_RANGE
        bench.guest.least = GIB
        begun = await bench.resizes.begin("g", SMALL)
        with pytest.raises(StoragedError, match="running already") as busy:
            await bench.resizes.begin("g", SMALL)
        assert busy.value.kind is Kind.BUSY
        await bench.ends(begun.id)
        with pytest.raises(StoragedError, match="has ended"):
            await bench.resizes.cancel(begun.id)
        with pytest.raises(StoragedError, match="there is no resize"):
            await bench.resizes.cancel("nope")
        bench.runs = False
        with pytest.raises(StoragedError, match="does not run"):
            await bench.resizes.begin("g", LARGE)


async def test_a_kernel_that_never_sees_its_disk_gets_the_old_one_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SMALL)
    bench.guest.blind = True
    async with running(bench):
        saga = await bench.ends((await bench.resizes.begin("g", LARGE)).id)
    assert saga.outcome is Outcome.FAILED
    assert "does not see its larger disk" in saga.reason
    assert bench.sizes() == (SMALL, SMALL)
    assert bench.told == [LARGE, SMALL], "what it may take is told in time, and taken back"


async def test_only_so_many_are_remembered(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SMALL)
    bench.settings = replace(bench.settings, keep=2)
    bench.new()
    async with running(bench):
        ended = [await bench.ends((await bench.resizes.begin("g", size)).id) for size in (LARGE, SMALL, LARGE, SMALL)]
    assert list(bench.resizes.snapshot) == ended[:0:-1]


def test_a_journal_that_cannot_be_believed_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "state" / "j.json"
    journal = Journal(str(path))
    assert journal.load() == []
    kept = [Saga("a", "g", LARGE, 1.5), Saga("b", "g", SMALL, 2.0, stage=Stage.ENDED, outcome=Outcome.CANCELLED)]
    journal.save(kept)
    assert journal.load() == kept
    assert path.stat().st_mode & 0o777 == 0o600
    for damage in (path.read_bytes()[:-9], b"", b"00000000\n[]", path.read_bytes().replace(b'"a"', b'"b"')):
        path.write_bytes(damage)
        assert journal.load() == []
        assert not path.exists()
        journal.save(kept)
