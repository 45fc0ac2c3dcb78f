"""One saved machine for all tests, and a fresh one from it for each."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.vm import image, parts
from tests.vm.guests import VirtualGuest
from tests.vm.machine import Machine, free_directory

MakeGuest = Callable[[], VirtualGuest]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.get_closest_marker("vm")]
    if mine and (reason := parts.why_not()):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=f"vm: {reason}"))


@pytest.fixture(scope="session")
def saved() -> Iterator[Path]:
    """The state of a machine that booted and waits for its process 1."""
    directory = Path(tempfile.mkdtemp(prefix="storaged-vm-"))
    try:
        image.disk()
        image.initramfs()
        asyncio.run(_save(directory))
        yield directory / "state"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _save(directory: Path) -> None:
    machine = Machine(free_directory(directory, "first"), 3)
    began = time.monotonic()
    try:
        await machine.power_on()
        await machine.booted()
        booted = time.monotonic()
        await machine.save(directory / "state")
    except BaseException:
        print(machine.says())
        raise
    finally:
        await machine.close()
    print(f"vm: booted in {booted - began:.1f} s, saved in {time.monotonic() - booted:.1f} s")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for sockets and disks; gone after the test."""
    path = Path(tempfile.mkdtemp(prefix="storaged-vm-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def make_guest(saved: Path, place: Path) -> AsyncIterator[MakeGuest]:
    """`make_guest()`: a machine of its own, gone after the test; what it said is shown when the test failed."""
    guests: list[VirtualGuest] = []

    def make() -> VirtualGuest:
        guests.append(VirtualGuest(place, saved))
        return guests[-1]

    yield make
    for guest in guests:
        await guest.close()
        print(guest.machine.says())
