"""Relocations that the balloon could meet: the kernel's own are turned off, and a balance by hand is told of."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.loop import Guest, fill, run
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import report_for

pytestmark = pytest.mark.btrfs
THRESHOLD = "allocation/data/bg_reclaim_threshold"


def _sysfs(guest: Guest) -> Path:
    filesystem = BtrfsFilesystem(str(guest.mountpoint))
    try:
        return Path("/sys/fs/btrfs") / filesystem.uuid
    finally:
        filesystem.close()


def _threshold(guest: Guest) -> int:
    return int((_sysfs(guest) / THRESHOLD).read_text(encoding="ascii"))


def _set_threshold(guest: Guest, percent: int) -> None:
    (_sysfs(guest) / THRESHOLD).write_text(str(percent), encoding="ascii")


def test_the_kernels_own_reclaim_is_off_until_the_balloon_is_released(
    make_guest: MakeGuest, make_daemon: MakeDaemon
) -> None:
    guest = make_guest(2 * GIB)
    _set_threshold(guest, 75)
    daemon = make_daemon(guest)
    assert _threshold(guest) == 0
    assert any("bg_reclaim_threshold 75" in note for note in daemon.report().notes)
    assert daemon.report_free(report_for(GIB)) == vm_guest_pb2.SUCCESS
    _set_threshold(guest, 50)  # by hand, meanwhile
    support.until(lambda: _threshold(guest) == 0, within_s=5)
    daemon.kill()
    daemon.start()
    assert _threshold(guest) == 0
    daemon.kill()
    state = daemon.socket.parent / "state"
    command = (sys.executable, "-m", "storaged", "release", "--stateful", guest.mountpoint, "--state-dir", state)
    run(*command)
    assert _threshold(guest) == 75, "as it was found first"


@pytest.mark.parametrize(("limit", "starving"), [(2 * GIB, False), (500 * MIB, True)])
def test_a_balance_by_hand_is_told_with_what_it_costs(
    limit: int, starving: bool, make_guest: MakeGuest, make_daemon: MakeDaemon
) -> None:
    guest = make_guest(4 * GIB)
    fill(guest.mountpoint / "data", 700 * MIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
    command = ("btrfs", "balance", "start", "--full-balance", str(guest.mountpoint))
    until = time.monotonic() + 30
    while "did not start" not in daemon.report().balloon.warning and time.monotonic() < until:
        # One may end before the next sample.
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as balance:
            support.until(lambda: "did not start" in daemon.report().balloon.warning or balance.poll() is not None)
            with contextlib.suppress(RuntimeError):  # it has ended
                run("btrfs", "balance", "cancel", guest.mountpoint)
    told = daemon.report()
    assert any("a balance that storaged did not start" in note for note in told.notes), told.notes
    log = daemon.log.read_text(encoding="utf-8")
    assert "can grow by up to" in log
    assert ("can force the filesystem read-only" in log) == starving
