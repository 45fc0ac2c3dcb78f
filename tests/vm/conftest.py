"""One saved machine for all tests, and a fresh one from it for each."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vm import image, parts
from tests.vm.guests import SERVES, VirtualGuest, settings_script
from tests.vm.machine import Machine, free_directory, until

MakeGuest = Callable[[], VirtualGuest]


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a machine can begin."""

    booted: Path
    """It waits for its process 1."""
    serving: Path
    """The daemon is process 1, and waits for its filesystem."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.get_closest_marker("vm")]
    if mine and (reason := parts.why_not()):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=f"vm: {reason}"))


@pytest.fixture(scope="session")
def saved() -> Iterator[Saved]:
    """A machine is booted once, and saved before and after its daemon starts."""
    directory = Path(tempfile.mkdtemp(prefix="storaged-vm-"))
    try:
        image.disk()
        image.initramfs()
        asyncio.run(_save(directory))
        yield Saved(directory / "booted", directory / "serving")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _save(directory: Path) -> None:
    machine = Machine(free_directory(directory, "first"), 3)
    began = time.monotonic()
    try:
        await machine.power_on()
        await machine.booted()
        booted = time.monotonic()
        await machine.save(directory / "booted")
        await machine.go()
        await machine.run(settings_script())
        await until(lambda: SERVES in machine.console_path.read_bytes(), 60, "the daemon serves")
        await machine.save(directory / "serving")
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
