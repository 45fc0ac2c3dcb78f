"""An engine that begins when its filesystem is there."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from storaged import app
from storaged.app.worlds import watch_capacity
from storaged.btrfs import capacity
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.core.model import Config, Told
from storaged.core.ports import World
from storaged.errors import Kind, StoragedError
from storaged.late import LateStorage
from storaged.runtime import StorageService
from storaged.sim import SimDisk, make_world
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
