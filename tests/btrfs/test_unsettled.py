"""When the balloon cannot get to its target: it says why, everywhere, and settles by itself once it can."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged import app, check
from storaged.balloon.place import NAMES
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.btrfs.resizer import ChildResizer
from storaged.errors import Unfit
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import SUBVOLUME, Figures, available, metric, report_for

pytestmark = pytest.mark.btrfs
METRICS = ("--metrics", "127.0.0.1:0")


def _fails(daemon: Daemon, limit: int, *words: str) -> None:
    """A report is answered with failure, and the reason stands everywhere it should."""
    assert daemon.report_free(report_for(limit)) == vm_guest_pb2.BALLOON_INFLATE_FAILED
    report = daemon.report()
    assert report.balloon.state == storaged_v1_pb2.BALLOON_FAILED
    for word in words:
        assert word in report.balloon.failure_reason
    assert report.balloon.limit_bytes == limit
    assert report.balloon.HasField("retry_in_s")
    log = daemon.log.read_text(encoding="utf-8")
    assert f"the balloon is not at its target: {report.balloon.failure_reason}" in log
    assert metric(daemon, 'storaged_balloon_state{state="failed"}') == 1.0
    assert metric(daemon, 'storaged_balloon_updates_total{result="failed"}') >= 1.0


def _settles(daemon: Daemon, guest: Guest, limit: int, figures: Figures, cause: str) -> None:
    """Without another word from the host."""
    took = support.until(lambda: daemon.report().balloon.state == storaged_v1_pb2.BALLOON_IDLE)
    figures.note(cause=cause, settled_after_s=round(took, 2))
    assert abs(available(guest) - limit) <= 16 * MIB
    assert daemon.report().balloon.failure_reason == ""
    assert metric(daemon, 'storaged_balloon_state{state="failed"}') == 0.0
    assert "the balloon is at its target again" in daemon.log.read_text(encoding="utf-8")


def test_a_paused_balance(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    guest = make_guest(3 * GIB)
    for index in range(6):
        fill(guest.mountpoint / f"data{index}", 120 * MIB)
    daemon = make_daemon(guest, *METRICS)
    assert daemon.report_free(report_for(GIB)) == vm_guest_pb2.SUCCESS
    support.pause_a_balance(guest)
    _fails(daemon, 300 * MIB, "balance")
    # What needs no room is done all the same, and is no failure.
    assert daemon.report_free(report_for(GIB + 200 * MIB)) == vm_guest_pb2.SUCCESS
    assert available(guest) >= GIB + 150 * MIB
    _fails(daemon, 300 * MIB, "balance")
    run("btrfs", "balance", "cancel", guest.mountpoint)
    _settles(daemon, guest, 300 * MIB, figures, "balance")


def test_a_grow_beside_a_paused_balance(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(3 * GIB, device_size=4 * GIB)
    for index in range(6):
        fill(guest.mountpoint / f"data{index}", 120 * MIB)
    daemon = make_daemon(guest)
    support.pause_a_balance(guest)
    daemon.resize(4 * GIB)
    assert daemon.wait_resized(20).current_size == 3 * GIB
    job = daemon.report().job
    assert job.state == storaged_v1_pb2.JOB_FAILED
    assert "cancel the paused balance first" in job.reason
    assert job.reason in daemon.log.read_text(encoding="utf-8")
    assert "is paused" in support.balance_status(guest)


def test_a_cancel_ends_no_paused_balance(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(3 * GIB)
    for index in range(6):
        fill(guest.mountpoint / f"data{index}", 120 * MIB)
    support.pause_a_balance(guest)
    with contextlib.closing(BtrfsFilesystem(str(guest.mountpoint))) as filesystem:
        resizer = ChildResizer(filesystem)
        try:
            resizer._moving = True  # the moment between the request and the kernel's refusal
            resizer.cancel()
        finally:
            resizer.close()
    assert "is paused" in support.balance_status(guest)
    run("btrfs", "balance", "cancel", guest.mountpoint)


def test_what_check_calls_failed_is_not_served_in_silence(
    make_guest: MakeGuest, make_daemon: MakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = make_guest(GIB)
    where = str(guest.mountpoint)
    monkeypatch.setattr(platform, "release", lambda: "5.10.0-32-amd64")
    said = next(line.reason for line in check.examine(where) if line.topic == "kernel")
    assert "5.10.0-32-amd64 is older than 5.14" in said
    with pytest.raises(Unfit, match=re.escape(said)):
        app.real_world(where, str(tmp_path), fit=True)
    app.real_world(where, str(tmp_path)).close()
    monkeypatch.undo()

    run("mount", "-o", "remount,ro", guest.mountpoint)
    said = next(line.reason for line in check.examine(where) if line.topic == "filesystem")
    with pytest.raises(RuntimeError, match=re.escape(f"{said}; serve.allow_unsupported starts all the same")):
        make_daemon(guest)
    patient = make_daemon(guest, "--wait-for-stateful", managed=False)
    with pytest.raises(grpc.RpcError, match=re.escape(said)):
        patient.report()


def test_a_filesystem_mounted_read_only(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    guest = make_guest(GIB)
    run("mount", "-o", "remount,ro", guest.mountpoint)
    daemon = make_daemon(guest, *METRICS, "--allow-unsupported")
    _fails(daemon, 300 * MIB, "read-only")
    assert daemon.report().filesystem.read_only
    run("mount", "-o", "remount,rw", guest.mountpoint)
    _settles(daemon, guest, 300 * MIB, figures, "read-only")


def _limit_the_subvolume(guest: Guest) -> Callable[[], object]:
    path = guest.mountpoint / SUBVOLUME
    run("btrfs", "qgroup", "limit", "50M", path)
    return lambda: run("btrfs", "qgroup", "limit", "none", path)


def _limit_a_group_above_it(guest: Guest) -> Callable[[], object]:
    subvolume = run("btrfs", "subvolume", "list", guest.mountpoint).split()[1]
    run("btrfs", "qgroup", "create", "1/7", guest.mountpoint)
    run("btrfs", "qgroup", "assign", f"0/{subvolume}", "1/7", guest.mountpoint)
    run("btrfs", "quota", "rescan", "-w", guest.mountpoint)
    run("btrfs", "qgroup", "limit", "60M", "1/7", guest.mountpoint)
    return lambda: run("btrfs", "qgroup", "limit", "none", "1/7", guest.mountpoint)


@pytest.mark.parametrize("limited", [_limit_the_subvolume, _limit_a_group_above_it])
def test_a_quota_on_the_balloon(
    limited: Callable[[Guest], Callable[[], object]], make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest, *METRICS)
    assert daemon.report_free(report_for(available(guest) - 20 * MIB)) == vm_guest_pb2.SUCCESS
    run("btrfs", "quota", "enable", guest.mountpoint)
    run("btrfs", "quota", "rescan", "-w", guest.mountpoint)
    lift = limited(guest)
    _fails(daemon, 300 * MIB, "quota")
    lift()
    _settles(daemon, guest, 300 * MIB, figures, "quota")


def test_a_quota_on_the_parent(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    # The parent's limit does not count the balloon, only the making of its subvolume.
    guest = make_guest(GIB)
    fill(guest.mountpoint / "data", 60 * MIB)
    run("btrfs", "quota", "enable", guest.mountpoint)
    run("btrfs", "quota", "rescan", "-w", guest.mountpoint)
    run("btrfs", "qgroup", "limit", "10M", guest.mountpoint)
    daemon = make_daemon(guest, *METRICS)
    if daemon.report_free(report_for(300 * MIB)) == vm_guest_pb2.BALLOON_INFLATE_FAILED:
        _fails(daemon, 300 * MIB, "quota")
        run("btrfs", "quota", "disable", guest.mountpoint)  # over the limit, even lifting it is over it
        _settles(daemon, guest, 300 * MIB, figures, "parent quota")
    assert abs(available(guest) - 300 * MIB) <= 16 * MIB


def test_all_names_are_taken(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest, *METRICS)
    for name in NAMES:
        (guest.mountpoint / name).write_bytes(b"mine")
    _fails(daemon, 300 * MIB, "in the way of the balloon")
    (guest.mountpoint / NAMES[3]).unlink()
    _settles(daemon, guest, 300 * MIB, figures, "squatters")
    assert (guest.mountpoint / NAMES[3]).is_dir()
