"""A shrink that is cut off: the kernel goes on believing that there is no room, and its work outlives the daemon."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lab import loop
from lab.daemon import Daemon
from lab.loop import Guest, run
from lab.recovery import available, size_of, spread
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.rpc.proto import storaged_v1_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon

pytestmark = pytest.mark.btrfs
SIZE = 4 * GIB
TRIES = 6


@pytest.fixture
def guest() -> Iterator[Guest]:
    """Some data at the bottom, much at the top, and a hole between: the first step that moves anything is long."""
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
        yield made


def _preallocate(path: Path, size: int) -> int:
    """Take room and give it back; the errno, 0 when it was there."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            return error.errno or -1
        finally:
            os.ftruncate(file.fileno(), 0)
    return 0


def _refused_meanwhile(guest: Guest, filesystem: BtrfsFilesystem, daemon: Daemon) -> bool:
    """Shrink, and ask for more than there is while the kernel moves data; True when it was still at it."""
    daemon.resize(daemon.minimum())
    # The kernel shows the target at once. The first steps only cut away what is empty.
    until = time.monotonic() + 3
    while filesystem.size() >= SIZE * 3 // 4 and time.monotonic() < until:
        pass
    return bool(_preallocate(guest.mountpoint / "hog", 3 * GIB)) and filesystem.size() < SIZE * 3 // 4


def _cut_off(how: str, daemon: Daemon, children: list[int]) -> None:
    if how == "cancelled":
        with contextlib.suppress(grpc.RpcError):  # it has just ended
            daemon.storage.CancelResize(storaged_v1_pb2.CancelResizeRequest(), timeout=20)
    elif how == "child killed":
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        daemon.wait_resized()
    else:
        daemon.kill()
        daemon.start()


@pytest.mark.parametrize("how", ["child killed", "daemon killed", "cancelled"])
def test_the_room_is_there_again(how: str, guest: Guest, make_daemon: MakeDaemon) -> None:
    # While the shrink runs there is no room for a large file: the kernel makes a note of it, which outlives the shrink.
    daemon = make_daemon(guest)
    filesystem = BtrfsFilesystem(str(guest.mountpoint))
    try:
        for _ in range(TRIES):
            children = daemon.children()
            refused = _refused_meanwhile(guest, filesystem, daemon)
            _cut_off(how, daemon, children)
            assert daemon.status().current_size // 4096 * 4096 == size_of(guest.mountpoint)
            if daemon.status().current_size != SIZE:
                return  # it was nearly done, and there is nothing left to move
            support.sync(guest)
            room = available(guest.mountpoint) * 9 // 10
            assert _preallocate(guest.mountpoint / "probe", room) == 0, f"refused meanwhile: {refused}"
    finally:
        filesystem.close()
