"""kill -9 at any moment: the filesystem stays sound, and the next daemon tells the truth about what was going on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import grpc
import pytest

from lab import loop
from lab.daemon import Daemon
from lab.killing import Killer
from lab.loop import run
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import Figures, available, report_for, running

pytestmark = [pytest.mark.btrfs, pytest.mark.once]
LARGE = 24 * GIB
FEW, MANY = 8, 250


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills: int, figures: Figures) -> None:
    with loop.workspace(loop.memory()) as directory:
        tally = Killer(directory, seed=kills).run(kills)
    figures.show("kills", tally)
    assert tally.faults == []
    assert sum(tally.kills.values()) >= kills
    assert tally.records
    assert set(tally.victims) == {"daemon", "child", "both"}, tally
    if kills == MANY:  # what a few meet is up to chance
        assert set(tally.works) >= {"shrink", "best effort", "grow", "inflate", "deflate", "its start"}, tally
        assert tally.resizing >= kills // 25, tally


def _restarted_while_it_waits(daemon: Daemon) -> None:
    """Kill the daemon while its job waits for the device, the one work that surely lasts; start the next."""
    (child,) = daemon.children("resize_worker")
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
    (child,) = daemon.children("resize_worker")
    _kill(child)
    support.until(lambda: not running(child), within_s=10)
    daemon.resize(3 * GIB)
    assert daemon.wait_resized().current_size == 3 * GIB
    assert daemon.report().job.state == storaged_v1_pb2.JOB_DONE


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_the_child_never_outlives_the_daemon(how: str, make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB, device_size=2 * GIB)
    daemon = make_daemon(guest)
    there = daemon.children()
    assert len(there) == 2
    assert all(map(running, there))
    if how == "kill":
        daemon.kill()
    else:
        assert daemon.stop() == 0
    support.until(lambda: not any(map(running, there)), within_s=10)
    guest.unmount()  # they held a descriptor of the filesystem
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
