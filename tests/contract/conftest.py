"""Both worlds behind the same ports: the simulation, and a btrfs on a loop device (marked `btrfs`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.loop import Guest, fill, workspace
from storaged.app import real_world
from storaged.core.ports import World
from storaged.sim import SimDisk, make_world
from storaged.units import GIB

SIZE, DEVICE = GIB, 2 * GIB


class Place:
    """One filesystem: its ports, and what applications do to it."""

    world: World
    slack = 0
    """Bytes of data an application's file may cost beside what is in it (none in the simulation)."""

    def write(self, size: int) -> None:
        """An application writes `size` bytes, and they are on the disk."""
        raise NotImplementedError

    def delete(self) -> None:
        """An application deletes all that it wrote."""
        raise NotImplementedError

    def reopened(self) -> World:
        """The ports as a daemon that starts now finds them; the old ones are closed."""
        raise NotImplementedError


class SimPlace(Place):
    """In memory."""

    def __init__(self) -> None:
        self._disk = SimDisk(SIZE, DEVICE)
        self._written = 0
        self.world = make_world(self._disk)

    def write(self, size: int) -> None:
        self._written += self._disk.write(size)

    def delete(self) -> None:
        self._disk.delete(self._written)

    def reopened(self) -> World:
        self.world = make_world(self._disk, journal=self.world.journal)
        return self.world


class RealPlace(Place):
    """A btrfs on a sparse image, and the adapters that speak to the kernel."""

    slack = 1 << 20

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.guest = Guest(directory / "disk", SIZE, device_size=DEVICE)
        self._files: list[Path] = []
        self.world = self._open()

    def _open(self) -> World:
        return real_world(str(self.guest.mountpoint), str(self._directory / "state"))

    def write(self, size: int) -> None:
        path = self.guest.mountpoint / f"file {len(self._files)}"
        self._files.append(path)
        written, error = fill(path, size)
        assert (written, error) == (size, 0)
        self.world.filesystem.sync()

    def delete(self) -> None:
        for path in self._files:
            path.unlink()
        self._files.clear()
        self.world.filesystem.sync()

    def reopened(self) -> World:
        self.close()
        self.world = self._open()
        return self.world

    def close(self) -> None:
        """Let go of the filesystem."""
        world: Any = self.world  # only the real ports hold files open
        for port in (world.resizer, world.balloon, world.filesystem):
            port.close()


@pytest.fixture(params=["sim", pytest.param("real", marks=pytest.mark.btrfs)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A fresh filesystem of 1 GiB on a device of 2 GiB."""
    if request.param == "sim":
        yield SimPlace()
        return
    with workspace() as directory:
        real = RealPlace(directory)
        try:
            yield real
        finally:
            real.close()
            real.guest.close()
