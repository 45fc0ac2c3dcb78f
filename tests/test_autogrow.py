"""A filesystem that follows its device, where that is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from storaged.autogrow import AutoGrow
from storaged.core.model import Config, Told
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
