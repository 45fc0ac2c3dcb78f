"""One daemon works on a filesystem, however it is mounted; another one serves what needs no filesystem."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import grpc
import pytest

from lab.daemon import Daemon
from lab.loop import run
from storaged.balloon.file import BtrfsBalloonFile
from storaged.errors import FilesystemError
from storaged.rpc.proto import common_pb2, vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.subvolumes import in_subvolume, open_balloon, top_level
from tests.btrfs.support import report_for

pytestmark = pytest.mark.btrfs


# --- one at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_at_top", [True, False])
def test_one_daemon_for_a_filesystem_however_it_is_mounted(first_at_top: bool, make_guest: MakeGuest) -> None:
    guest = in_subvolume(make_guest(GIB))
    with top_level(guest) as top:
        first, second = (top, guest.mountpoint) if first_at_top else (guest.mountpoint, top)
        balloon = BtrfsBalloonFile(str(first))
        for _ in range(3):
            with pytest.raises(FilesystemError, match="another storaged holds the balloon of"):
                BtrfsBalloonFile(str(second))
        balloon.close()
        BtrfsBalloonFile(str(second)).close()
    guest.unmount()
    guest.check()


def test_nothing_is_held_afterwards(make_guest: MakeGuest) -> None:
    guest = in_subvolume(make_guest(GIB))
    before = sorted(os.listdir("/proc/self/fd"))
    with open_balloon(guest) as balloon:
        balloon.extend(MIB)
    assert sorted(os.listdir("/proc/self/fd")) == before
    run("umount", guest.mountpoint)
    assert not list(Path("/sys/fs/btrfs").glob(f"*/devices/{guest.device[5:]}")), "the device is let go at once"


# --- the contract is served in any case -------------------------------------------------------------------------


def _refused(daemon: Daemon) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        daemon.maitred.GetResizeStatus(common_pb2.EmptyMessage(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value.details())


def _managed(daemon: Daemon) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return bool(daemon.status().current_size)
    return False


@pytest.mark.parametrize("inflated", [True, False])
def test_a_second_daemon_serves_what_it_can_and_takes_over(
    inflated: bool, make_guest: MakeGuest, make_daemon: MakeDaemon
) -> None:
    guest = make_guest(GIB)
    first = make_daemon(guest)
    if inflated:
        assert first.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS
    second = make_daemon(guest, state="second", managed=False)
    assert second.maitred.GetKernelVersion(common_pb2.EmptyMessage(), timeout=5).kernel_release
    assert "another storaged holds the balloon" in _refused(second)
    with pytest.raises(grpc.RpcError, match="another storaged holds the balloon"):
        second.report()
    with pytest.raises(grpc.RpcError, match="another storaged holds the balloon"):
        second.report_free(report_for(300 * MIB))
    time.sleep(2)
    assert first.report_free(report_for(100 * MIB)) == vm_guest_pb2.SUCCESS
    assert first.stop() == 0
    support.until(lambda: _managed(second), within_s=10)
    assert second.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS
    log = second.log.read_text(encoding="utf-8")
    warnings = [line for line in log.splitlines() if "WARNING storaged.late" in line]
    assert len(warnings) == 1, "once, not at every try"
    assert second.stop() == 0
    guest.unmount()
