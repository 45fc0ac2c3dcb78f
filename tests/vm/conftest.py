"""One saved machine for all tests, and a fresh one from it for each."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from lab.loop import memory
from lab.vm import parts
from lab.vm.guests import VirtualGuest
from lab.vm.saved import Saved, save, save_several

DAEMONS = 5
MakeGuest = Callable[[], VirtualGuest]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.get_closest_marker("vm")]
    if mine and (reason := parts.why_not()):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=f"vm: {reason}"))


@pytest.fixture(scope="session")
def saved() -> Iterator[Saved]:
    """A machine is booted once, and saved before and after its daemon starts."""
    directory = Path(tempfile.mkdtemp(prefix="storaged-vm-", dir=memory()))
    try:
        yield asyncio.run(save(directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def several(saved: Saved) -> Path:
    """The serving machine with DAEMONS daemons, each of which waits for a filesystem of its own."""
    return asyncio.run(save_several(saved, DAEMONS))


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for sockets and disks; gone after the test."""
    path = Path(tempfile.mkdtemp(prefix="storaged-vm-", dir=memory()))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def make_guest(saved: Saved, place: Path) -> AsyncIterator[MakeGuest]:
    """`make_guest()`: a machine of its own, gone after the test; what it said is shown when the test failed."""
    guests: list[VirtualGuest] = []

    def make() -> VirtualGuest:
        for one in [one for one in guests if one.over]:
            guests.remove(one)
        guests.append(VirtualGuest(place, saved.booted, saved.serving))
        return guests[-1]

    yield make
    for guest in guests:
        await guest.close()
        print(guest.machine.says())
