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

from lab.loop import memory
from tests.vm import image, parts
from tests.vm.guests import SERVES, VirtualGuest, settings_script, several_script
from tests.vm.machine import Machine, free_directory, until

DAEMONS = 5
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
    directory = Path(tempfile.mkdtemp(prefix="storaged-vm-", dir=memory()))
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


@pytest.fixture(scope="session")
def several(saved: Saved) -> Path:
    """The serving machine with DAEMONS daemons, each of which waits for a filesystem of its own."""
    asyncio.run(_save_several(saved))
    return saved.serving.parent / "several"


async def _save_several(saved: Saved) -> None:
    machine = Machine(free_directory(saved.serving.parent, "second"), 3)
    try:
        await machine.wake(saved.serving)
        await machine.go()
        await machine.run(several_script(DAEMONS))
        await until(lambda: machine.console_path.read_bytes().count(SERVES) == DAEMONS - 1, 90, "the daemons serve")
        await machine.save(saved.serving.parent / "several")
    except BaseException:
        print(machine.says())
        raise
    finally:
        await machine.close()


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
