"""A filesystem that follows its device, where that is wanted."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from storaged.autogrow import AutoGrow
from storaged.core.model import Config, Told
from storaged.errors import FilesystemError
from storaged.runtime import StorageService
from storaged.sim import SimDisk, make_world
from storaged.units import GIB
from tests.rpc.conftest import RealTime, until


@pytest.fixture
async def disk() -> SimDisk:
    return SimDisk(4 * GIB, device=6 * GIB)


@pytest.fixture
async def storage(disk: SimDisk) -> AsyncIterator[StorageService]:
    service = StorageService(make_world(disk, clock=RealTime()), replace(Config(), auto_grow=True))
    await service.start()
    AutoGrow(service)
    try:
        yield service
    finally:
        await service.stop()


async def told(storage: StorageService, disk: SimDisk, device: int) -> None:
    """The host gives the device another size, and the kernel tells."""
    disk.set_device(device)
    storage.capacity_changed()
    await storage.alive()
    await asyncio.sleep(0.2)


async def test_it_grows_with_its_device(storage: StorageService, disk: SimDisk) -> None:
    await told(storage, disk, 8 * GIB)

    async def grown() -> bool:
        return disk.size == 8 * GIB

    await until(grown)
    assert storage.current_size() == 8 * GIB


async def test_room_that_was_there_before_is_none_of_its_business(storage: StorageService, disk: SimDisk) -> None:
    # A host that shrinks has made the filesystem smaller, and is about to cut the image.
    await told(storage, disk, 6 * GIB)
    assert disk.size == 4 * GIB
    await told(storage, disk, 5 * GIB)
    assert disk.size == 4 * GIB


async def test_only_where_it_is_wanted(storage: StorageService, disk: SimDisk) -> None:
    storage.reconfigure(Config())
    await told(storage, disk, 8 * GIB)
    assert disk.size == 4 * GIB


async def test_not_while_the_host_is_critically_full(storage: StorageService, disk: SimDisk) -> None:
    await storage.report(Told.CRITICAL, GIB // 2)
    await told(storage, disk, 8 * GIB)
    assert disk.size == 4 * GIB


async def has(storage: StorageService, size: int) -> None:
    """Wait until the filesystem has this size, and nothing goes on."""

    async def idle() -> bool:
        return storage.current_size() == size and storage.snapshot.state.active_job is None

    await until(idle)


@pytest.fixture
def asked(storage: StorageService, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every size that the engine was asked for."""
    sizes, resize = [], storage.resize

    async def counted(size: int) -> bool:
        sizes.append(size)
        return await resize(size)

    monkeypatch.setattr(storage, "resize", counted)
    return sizes


async def test_what_was_refused_at_critical_comes_at_a_better_level(
    storage: StorageService, disk: SimDisk, asked: list[int]
) -> None:
    storage.reconfigure(replace(Config(), auto_grow=True, settle_s=0.2))
    await storage.report(Told.CRITICAL, GIB // 2)
    await told(storage, disk, 8 * GIB)
    for _ in range(5):
        await storage.report(Told.CRITICAL, GIB // 2)
        await storage.alive()
    assert asked == [8 * GIB], "not again while nothing is better"
    assert disk.size == 4 * GIB
    for _ in range(20):
        await storage.report(Told.NORMAL, 100 * GIB)
        await asyncio.sleep(0.05)
    await has(storage, 8 * GIB)
    assert len(asked) <= 3, "once a level"


async def test_what_came_while_a_job_waited_comes_after_it(
    storage: StorageService, disk: SimDisk, asked: list[int]
) -> None:
    assert await storage.resize(20 * GIB)
    await told(storage, disk, 8 * GIB)
    assert disk.size == 4 * GIB
    await storage.cancel()
    await has(storage, 8 * GIB)
    assert asked == [20 * GIB, 8 * GIB]


async def test_two_growths_of_the_device_in_a_row(storage: StorageService, disk: SimDisk, asked: list[int]) -> None:
    kernel = disk.faults.hang("resize")
    await told(storage, disk, 8 * GIB)
    await told(storage, disk, 10 * GIB)
    assert storage.snapshot.state.active_job is not None
    kernel.set()
    await has(storage, 10 * GIB)
    assert asked == [8 * GIB, 10 * GIB]


async def test_a_filesystem_that_was_made_smaller_meanwhile_stays_so(
    storage: StorageService, disk: SimDisk, asked: list[int]
) -> None:
    await storage.report(Told.CRITICAL, GIB // 2)
    await told(storage, disk, 8 * GIB)
    assert await storage.resize(3 * GIB)
    await has(storage, 3 * GIB)
    await asyncio.sleep(0.2)
    assert asked == [8 * GIB, 3 * GIB], "its image is about to be cut"


async def test_a_growth_that_fails_is_not_begun_again_and_again(
    storage: StorageService, disk: SimDisk, asked: list[int]
) -> None:
    disk.faults.fail("resize", FilesystemError("broken on purpose", errno.EIO), times=100)
    await told(storage, disk, 8 * GIB)
    await asyncio.sleep(0.3)
    assert asked == [8 * GIB]


async def test_a_job_that_waited_for_the_device_is_enough(
    storage: StorageService, disk: SimDisk, asked: list[int]
) -> None:
    assert await storage.resize(8 * GIB)
    await told(storage, disk, 8 * GIB)
    await has(storage, 8 * GIB)
    await asyncio.sleep(0.2)
    assert asked == [8 * GIB]
