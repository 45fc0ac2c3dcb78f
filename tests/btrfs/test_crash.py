"""kill -9 at any moment: the filesystem stays sound, and the next daemon tells the truth about what was going on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import grpc
import pytest

from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import Figures, available, children, report_for, running

pytestmark = pytest.mark.btrfs
ENDED = (storaged_v1_pb2.JOB_DONE, storaged_v1_pb2.JOB_FAILED, storaged_v1_pb2.JOB_CANCELLED)
LARGE, SMALL = 24 * GIB, 2 * GIB


def _begin(daemon: Daemon, what: str, rng: random.Random) -> None:
    """Start the work without waiting for its end."""
    if what == "resize":
        now = daemon.status().current_size
        size = rng.choice([SMALL, 5 * GIB, 11 * GIB + 1, LARGE])
        size = LARGE if now < LARGE // 2 else size
        with contextlib.suppress(grpc.RpcError):  # below the minimum, which moves with the balloon
            daemon.resize(size)
        return
    free = report_for(rng.choice([0, 150 * MIB, GIB, 3 * GIB]))
    request = vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_NORMAL, free_space_bytes=free)
    daemon.maitred.UpdateStorageBalloon.future(request, timeout=10)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _truth(daemon: Daemon, guest: Guest) -> None:
    """What the daemon says about its last job is what the filesystem has."""
    report, status = daemon.report(), daemon.status()
    statvfs = os.statvfs(guest.mountpoint)
    size = statvfs.f_blocks * statvfs.f_frsize
    assert status.current_size // 4096 * 4096 == size
    assert not status.resize_in_progress
    if report.HasField("job"):
        job = report.job
        assert job.state in ENDED
        if job.state == storaged_v1_pb2.JOB_DONE:
            assert job.current_size == job.requested_size == status.current_size
        else:
            assert job.reason
    assert not support.read_only(guest)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rounds", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment(rounds: int, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    rng = random.Random(rounds)
    guest = make_guest(LARGE)
    fill(guest.mountpoint / "data", 48 * MIB)
    support.half_holes(guest, 8 * MIB)
    before = support.hashes(guest.mountpoint)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS
    outcomes: dict[str, int] = {}
    for _ in range(rounds):
        child = support.children(daemon.pid)
        what = rng.choice(["resize", "resize", "balloon"])
        victims = rng.choice(["daemon", "child", "both", "daemon"])
        _begin(daemon, what, rng)
        time.sleep(rng.choice([0, rng.uniform(0, 0.01), rng.uniform(0, 0.3)]))
        if victims != "daemon":
            for pid in child:
                _kill(pid)
        if victims == "child":
            daemon.wait_resized()
            _truth(daemon, guest)
            daemon.kill()
        else:
            daemon.kill()
        for pid in child:
            support.until(lambda pid=pid: not running(pid), within_s=10)  # type: ignore[misc]

        daemon.start()
        _truth(daemon, guest)
        report = daemon.report()
        outcome = f"{what}/{victims}/{storaged_v1_pb2.JobState.Name(report.job.state)}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        # The protection is there again, or still.
        limit = report.balloon.limit_bytes
        support.until(
            lambda limit=limit: available(guest) <= limit + GIB + 16 * MIB,  # type: ignore[misc]
            within_s=20,
        )
    figures.note(crashes=rounds, outcomes=outcomes)
    assert support.hashes(guest.mountpoint) == before
    assert daemon.report_free(report_for(100 * GIB)) == vm_guest_pb2.SUCCESS
    daemon.stop()
    guest.unmount()
    guest.check()


def _restarted_while_it_waits(daemon: Daemon) -> None:
    """Kill the daemon while its job waits for the device, the one work that surely lasts; start the next."""
    (child,) = children(daemon.pid)
    daemon.kill()
    support.until(lambda: not running(child), within_s=10)
    daemon.start()
    status, job = daemon.status(), daemon.report().job
    assert (status.resize_in_progress, status.current_size) == (False, GIB)
    assert job.state == storaged_v1_pb2.JOB_FAILED
    assert job.requested_size == 3 * GIB
    assert "stopped" in job.reason
    assert str(GIB) in job.reason


def test_a_job_in_flight_ends_truly(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest, config=support.QUIET + "capacity_wait_s = 60\n")
    daemon.resize(3 * GIB)
    support.until(lambda: daemon.report().HasField("job"))
    time.sleep(0.5)  # the journal is written meanwhile
    _restarted_while_it_waits(daemon)


@pytest.mark.parametrize(
    "what",
    [
        "balloon",
        "resize",
    ],
)
def test_no_answer_goes_out_before_the_journal_is_durable(
    what: str, make_guest: MakeGuest, make_daemon: MakeDaemon, place: Path
) -> None:
    # The journal lies on a disk of its own, which is frozen while the call is made: whatever is answered meanwhile
    # would be forgotten by a crash.
    guest, journals = make_guest(GIB), make_guest(256 * MIB)
    state = place / f"{guest.image.parent.name}-state"
    state.mkdir()
    (state / "state").symlink_to(journals.mountpoint)
    daemon = make_daemon(guest, config=support.QUIET + "capacity_wait_s = 60\n")
    run("fsfreeze", "--freeze", journals.mountpoint)
    try:
        answer = (
            daemon.maitred.ResizeFilesystem.future(vm_guest_pb2.ResizeFilesystemRequest(size=3 * GIB), timeout=20)
            if what == "resize"
            else daemon.maitred.UpdateStorageBalloon.future(
                vm_guest_pb2.UpdateStorageBalloonRequest(
                    state=vm_guest_pb2.DISK_NORMAL, free_space_bytes=report_for(200 * MIB)
                ),
                timeout=20,
            )
        )
        time.sleep(1)
        answered = answer.done()
    finally:
        run("fsfreeze", "--unfreeze", journals.mountpoint)
    assert not answered
    answer.result()
    if what == "resize":
        _restarted_while_it_waits(daemon)


def test_the_next_resize_works_after_the_child_was_killed(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB, device_size=4 * GIB)
    daemon = make_daemon(guest)
    (child,) = children(daemon.pid)
    _kill(child)
    support.until(lambda: not running(child), within_s=10)
    daemon.resize(3 * GIB)
    assert daemon.wait_resized().current_size == 3 * GIB
    assert daemon.report().job.state == storaged_v1_pb2.JOB_DONE


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_the_child_never_outlives_the_daemon(how: str, make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB, device_size=2 * GIB)
    daemon = make_daemon(guest)
    (child,) = children(daemon.pid)
    assert running(child)
    if how == "kill":
        daemon.kill()
    else:
        assert daemon.stop() == 0
    support.until(lambda: not running(child), within_s=10)
    guest.unmount()  # it held a descriptor of the filesystem
    guest.mount()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "other version"])
def test_a_damaged_journal_stops_nobody(
    damage: str, make_guest: MakeGuest, make_daemon: MakeDaemon, place: Path
) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS
    shown = available(guest)
    (journal,) = daemon.socket.parent.glob("state/*/journal.json")
    daemon.kill()
    whole = journal.read_bytes()
    journal.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "garbage": os.urandom(300),
            "other version": whole.replace(b'"version": 1', b'"version": 2'),
        }[damage]
    )
    daemon.start()
    assert abs(available(guest) - shown) <= 4 * MIB
    assert daemon.status().current_size == GIB
    assert daemon.report_free(report_for(100 * MIB)) == vm_guest_pb2.SUCCESS


def test_a_call_cut_off_by_a_crash_is_an_error_not_a_success(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(LARGE)
    daemon = make_daemon(guest)
    request = vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_NORMAL, free_space_bytes=GIB)
    answer = daemon.maitred.UpdateStorageBalloon.future(request, timeout=10)
    os.kill(daemon.pid, signal.SIGKILL)
    try:
        succeeded = answer.result().result == vm_guest_pb2.SUCCESS
    except grpc.RpcError:
        succeeded = False
    daemon.kill()
    if succeeded:
        assert available(guest) <= GIB
