"""After a shrink that was cut off the kernel may go on believing that no new chunk can be made."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import loop
from lab.daemon import Daemon
from lab.loop import Guest, run
from lab.recovery import available, spread
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon

pytestmark = [pytest.mark.btrfs, pytest.mark.once]
SIZE = 4 * GIB
ROUNDS = 4


@pytest.fixture
def guest() -> Iterator[Guest]:
    """Most data at the top, and empty chunks below it."""
    with loop.workspace(loop.memory()) as directory:
        made = Guest(directory / "disk", SIZE)
        root = made.mountpoint

        def write(number: int) -> None:
            (root / f"old{number}").write_bytes(os.urandom(4 * MIB if number < 34 else 40 * MIB))

        spread(root, SIZE * 7 // 10, 40, write)
        for number in range(8, 34):
            (root / f"old{number}").unlink()
        support.sync(made)
        run("btrfs", "-q", "balance", "start", "-dusage=0", root)
        _errno_of(root / "before", available(root) * 9 // 10)
        support.sync(made)
        yield made


def _errno_of(path: Path, size: int) -> int:
    """Take room and give it back; the errno, 0 when it was there."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            return error.errno or -1
        finally:
            os.ftruncate(file.fileno(), 0)
    return 0


def _shrink_that_is_in_the_way(guest: Guest, daemon: Daemon) -> None:
    """Begin a shrink; while the kernel is at it somebody asks for more room than there is for that long."""
    filesystem = BtrfsFilesystem(str(guest.mountpoint))
    try:
        daemon.resize(daemon.minimum())
        until = time.monotonic() + 3
        while filesystem.size() > SIZE * 3 // 4 and time.monotonic() < until:
            pass
        with (guest.mountpoint / "hog").open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, SIZE * 3 // 4)
            except OSError:
                return
    finally:
        filesystem.close()


@pytest.mark.parametrize("how", ["child", "daemon"])
def test_the_room_is_there_again(how: str, guest: Guest, make_daemon: MakeDaemon) -> None:
    # Whether the kernel is left in that state is a matter of moments; of so many rounds some leave it so.
    daemon = make_daemon(guest)
    for _ in range(ROUNDS):
        children = daemon.children("resize_worker")
        _shrink_that_is_in_the_way(guest, daemon)
        if how == "daemon":
            daemon.kill()
        for pid in children if how == "child" else []:
            os.kill(pid, signal.SIGKILL)
        if how == "child":
            daemon.wait_resized()
        (guest.mountpoint / "hog").unlink()
        if how == "daemon":
            daemon.start()
        support.sync(guest)
        assert _errno_of(guest.mountpoint / "probe", available(guest.mountpoint) * 9 // 10) == 0
        daemon.resize(SIZE)
        daemon.wait_resized()
