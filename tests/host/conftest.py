"""A host's disk that is small, for real."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.loop import run, workspace
from storaged.units import GIB


@pytest.fixture
def pool() -> Iterator[Path]:
    """An ext4 of 3 GiB, mounted."""
    with workspace() as directory:
        disk, mountpoint = directory / "disk.img", directory / "pool"
        mountpoint.mkdir()
        with disk.open("wb") as file:
            file.truncate(3 * GIB)
        run("mkfs.ext4", "-q", "-m", "0", disk)
        device = run("losetup", "--show", "-f", "--direct-io=off", disk)
        try:
            run("mount", device, mountpoint)
            yield mountpoint
        finally:
            _unmount(mountpoint)
            run("losetup", "-d", device)


def _unmount(mountpoint: Path) -> None:
    """The kernel lets go of the images on it a moment after their loop devices are taken away."""
    for _ in range(50):
        with contextlib.suppress(RuntimeError):
            run("umount", mountpoint)
            return
        time.sleep(0.1)
    run("umount", mountpoint)
