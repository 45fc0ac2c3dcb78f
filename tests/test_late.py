"""An engine that begins when its filesystem is there."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from storaged import app, late
from storaged.app.worlds import watch_capacity
from storaged.btrfs import capacity
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.core.model import Config, Space, Told
from storaged.core.ports import World
from storaged.errors import ConfigError, FilesystemError, Kind, NotBtrfs, StoragedError, Unfit, Unsupported
from storaged.late import LateStorage
from storaged.runtime import StorageService
from storaged.sim import SimBalloonFile, SimDisk, SimFilesystem, make_world
from storaged.units import GIB
from tests.rpc.conftest import RealTime


class Later:
    """A filesystem that is mounted when `there` is set."""

    def __init__(self) -> None:
        self.disk = SimDisk(8 * GIB)
        self.there = False
        self.begun: list[StorageService] = []
        self.storage = LateStorage(self.make, "/mnt/x", Config(), self._begin)

    def make(self) -> World:
        if not self.there:
            raise StoragedError("not mounted")
        return make_world(self.disk, clock=RealTime())

    async def _begin(self, service: StorageService) -> None:
        self.begun.append(service)


async def test_before_it_is_there_every_call_says_so() -> None:
    later = Later()
    await later.storage.start()
    for call in ("report", "resize", "bounds", "available", "snapshot", "current_size", "trim"):
        with pytest.raises(StoragedError, match="/mnt/x") as caught:
            getattr(later.storage.as_storage(), call)
        assert caught.value.kind is Kind.PRECONDITION
    await later.storage.alive()
    await later.storage.suspend()
    await later.storage.stop()


async def test_then_it_is_an_engine() -> None:
    later = Later()
    steps: list[object] = []
    later.storage.observe(lambda event, _: steps.append(event))
    await later.storage.start()
    later.there = True
    await asyncio.gather(*(later.storage.look() for _ in range(5)))
    assert len(later.begun) == 1, "once"
    storage = later.storage.as_storage()
    try:
        assert await storage.report(Told.NORMAL, 3 * GIB) == ""
        assert steps
        assert await storage.available() <= 2 * GIB + later.disk.data_chunk
    finally:
        await storage.stop()


async def test_what_was_halted_stays_halted() -> None:
    later = Later()
    later.there = True
    await later.storage.halt("going down")
    await later.storage.look()
    storage = later.storage.as_storage()
    try:
        with pytest.raises(StoragedError, match="going down"):
            await storage.resize(4 * GIB)
        storage.go_on()
        assert await storage.resize(4 * GIB)
    finally:
        await storage.stop()


async def test_nothing_begins_after_the_end() -> None:
    later = Later()
    await later.storage.close()
    later.there = True
    assert not await later.storage.look()
    assert not later.begun


@pytest.mark.parametrize("patient", [False, True])
async def test_what_check_calls_failed_ends_the_start_unless_it_may_wait(patient: bool) -> None:
    def make() -> World:
        raise Unfit("/mnt/x is mounted read-only")

    storage = LateStorage(make, "/mnt/x", Config(), Later()._begin, patient=patient)
    if patient:
        await storage.start()
        assert "mounted read-only" in storage.reason
    else:
        with pytest.raises(Unfit, match="mounted read-only"):
            await storage.start()
    await storage.stop()


def test_looking_for_it_leaves_no_file_open(tmp_path: Path) -> None:
    def look() -> None:
        with pytest.raises(StoragedError, match="not a mounted btrfs"):
            app.real_world("/proc", str(tmp_path))

    look()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        look()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_what_fails_beside_it_is_said_and_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    later = Later()
    later.there = True

    async def fails(service: StorageService) -> None:
        raise ImportError("No library named udev")

    later.storage = LateStorage(later.make, "/mnt/x", Config(), fails)
    await later.storage.watch_for_it()
    try:
        assert "No library named udev" in caplog.text
        assert await later.storage.as_storage().report(Told.NORMAL, 3 * GIB) == ""
    finally:
        await later.storage.stop()


async def test_without_libudev_a_job_polls(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(*_: object) -> None:
        raise ImportError("No library named udev")

    monkeypatch.setattr(capacity, "CapacityMonitor", missing)
    filesystem = BtrfsFilesystem.__new__(BtrfsFilesystem)
    filesystem.device_name = "254:16"
    storage: Any = SimpleNamespace(world=SimpleNamespace(filesystem=filesystem), capacity_changed=None)
    with caplog.at_level(logging.WARNING):
        assert watch_capacity(cast("StorageService", storage), asyncio.get_running_loop()) is None
    assert "polls" in caplog.text


async def test_the_reason_is_answered_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    later = Later()
    reasons = iter(["held by A", "held by A", "held by B", "held by A"])

    def make() -> World:
        raise FilesystemError(next(reasons), errno.EBUSY, Kind.BUSY)

    later.storage = LateStorage(make, "/mnt/x", Config(), later._begin, patient=False)
    await later.storage.start()
    for _ in range(3):
        assert not await later.storage.look()
    with pytest.raises(StoragedError, match=r"/mnt/x.*held by A") as caught:
        await later.storage.as_storage().report(Told.NORMAL, 3 * GIB)
    assert caught.value.kind is Kind.PRECONDITION
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    assert "held by A" in warned[0]
    assert "held by B" in warned[1]
    await later.storage.stop()


@pytest.mark.parametrize("error", [ConfigError("state directory"), Unsupported("two devices"), NotBtrfs("ext4")])
async def test_what_can_never_be_ends_the_start_unless_it_is_waited_for(error: StoragedError) -> None:
    later = Later()

    def make() -> World:
        raise error

    with pytest.raises(type(error)):
        await LateStorage(make, "/mnt/x", Config(), later._begin, patient=False).start()
    await LateStorage(make, "/mnt/x", Config(), later._begin, patient=True).start()


async def test_a_start_that_failed_leaves_nothing_open_and_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    later = Later()
    later.there = True
    closed: list[str] = []
    space = SimFilesystem.space
    errors: list[Exception] = [
        OSError(errno.EIO, "I/O"),
        ValueError("odd"),
    ]

    def fails(self: SimFilesystem) -> Space:
        if errors:
            raise errors.pop(0)
        return space(self)

    monkeypatch.setattr(SimFilesystem, "space", fails)
    monkeypatch.setattr(SimFilesystem, "close", lambda self: closed.append("filesystem"), raising=False)
    monkeypatch.setattr(SimBalloonFile, "close", lambda self: closed.append("balloon"), raising=False)
    monkeypatch.setattr(late, "RETRY_EVERY_S", 0.01)
    threads = threading.active_count()
    await later.storage.start()
    assert len(closed) == 2
    await asyncio.wait_for(later.storage.watch_for_it(), 10)
    try:
        assert later.storage.in_use
        assert closed == ["balloon", "filesystem"] * 2
        assert len(later.begun) == 1
    finally:
        await later.storage.stop()
    assert threading.active_count() <= threads + 8, "the pools of what failed are gone"


async def test_what_was_noticed_at_the_start_is_noted() -> None:
    later = Later()
    later.there = True
    make = later.make

    def noticed() -> World:
        world = make()
        world.balloon.found.append(("a stub was removed", False))
        return world

    later.storage = LateStorage(noticed, "/mnt/x", Config(), later._begin)
    await later.storage.start()
    try:
        assert "a stub was removed" in later.storage.as_storage().snapshot.notes
    finally:
        await later.storage.stop()


async def test_an_attempt_that_meets_the_end_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    later = Later()
    later.there = True
    closed: list[str] = []
    inside, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(SimBalloonFile, "close", lambda self: closed.append("balloon"), raising=False)

    def slow() -> World:
        inside.set()
        go_on.wait(10)
        return later.make()

    later.storage = LateStorage(slow, "/mnt/x", Config(), later._begin)
    attempt = asyncio.create_task(later.storage.look())
    await asyncio.to_thread(inside.wait, 10)
    closing = asyncio.create_task(later.storage.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert not await attempt
    assert closed == ["balloon"]
    assert not later.begun
