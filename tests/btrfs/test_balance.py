"""A balance that somebody else runs or has paused: a shrink waits for its end or says why not, and never ends it."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator

import grpc
import pytest

from lab.daemon import Daemon
from lab.loop import Guest, fill
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest

pytestmark = pytest.mark.btrfs
DISK = 6 * GIB
TARGET = 4 * GIB
EFFORTS = [pytest.param(False, id="shrink"), pytest.param(True, id="best effort")]


def _guest(make_guest: MakeGuest, files: int = 6) -> tuple[Guest, dict[str, str]]:
    guest = make_guest(DISK)
    for index in range(files):
        fill(guest.mountpoint / f"data{index}", 160 * MIB)
    support.sync(guest)
    return guest, support.hashes(guest.mountpoint)


def _start(daemon: Daemon, size: int, *, best_effort: bool) -> pb.Job:
    request = pb.ResizeRequest(size_bytes=size, best_effort=best_effort)
    return daemon.storage.Resize(request, timeout=20).job


def _cancel(daemon: Daemon) -> bool:
    """False when the job was over before."""
    try:
        daemon.storage.CancelResize(pb.CancelResizeRequest(), timeout=20)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
            raise
        return False
    return True


@pytest.mark.parametrize("best_effort", EFFORTS)
def test_a_paused_one_is_named_and_stays_paused(
    best_effort: bool, make_guest: MakeGuest, make_daemon: MakeDaemon
) -> None:
    guest, before = _guest(make_guest, files=3)
    daemon = make_daemon(guest)
    support.pause_a_balance(guest)
    _start(daemon, max(TARGET, daemon.minimum()), best_effort=best_effort)
    assert daemon.wait_resized(20).current_size == DISK
    job = daemon.report().job
    assert (job.state, job.current_size) == (pb.JOB_FAILED, DISK)
    assert "cancel the paused balance first" in job.reason
    assert "is paused" in support.balance_status(guest)
    # Who gives up ends the job and nothing else.
    for delay in (0.0, 0.0, 0.005, 0.02):
        _start(daemon, TARGET, best_effort=best_effort)
        time.sleep(delay)
        _cancel(daemon)
        assert daemon.wait_resized(20).current_size == DISK
        assert daemon.report().job.state in (pb.JOB_FAILED, pb.JOB_CANCELLED)
        assert "is paused" in support.balance_status(guest)
    assert support.hashes(guest.mountpoint) == before


@contextlib.contextmanager
def _balancing(guest: Guest) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody balances everything; it runs already."""
    command = ["btrfs", "balance", "start", "--full-balance", str(guest.mountpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as balance:
        support.until(lambda: "is running" in support.balance_status(guest), pause_s=0.002)
        yield balance


def _came_to_its_end(balance: subprocess.Popen[bytes]) -> bool:
    """Its exit code says nothing: it is the same for one that was cancelled."""
    said, _ = balance.communicate(timeout=60)
    return b"Done, had to relocate" in said


@pytest.mark.parametrize("best_effort", EFFORTS)
def test_a_running_one_is_waited_for(best_effort: bool, make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, before = _guest(make_guest)
    daemon = make_daemon(guest)
    with _balancing(guest) as balance:
        _start(daemon, TARGET, best_effort=best_effort)
        running = balance.poll() is None
        assert daemon.status().current_size == DISK
        assert _came_to_its_end(balance)
    assert running, "it was over before the shrink began"
    assert daemon.wait_resized().current_size == TARGET, daemon.report().job
    job = daemon.report().job
    assert (job.state, job.reason) == (pb.JOB_DONE, "")
    assert support.hashes(guest.mountpoint) == before
    daemon.stop()
    guest.unmount()
    guest.check()


def test_a_cancel_while_it_is_waited_for_does_not_end_it(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, before = _guest(make_guest)
    daemon = make_daemon(guest)
    with _balancing(guest) as balance:
        _start(daemon, TARGET, best_effort=True)
        time.sleep(0.1)
        began = time.monotonic()
        assert _cancel(daemon)
        assert time.monotonic() - began < 1
        job = daemon.report().job
        assert balance.poll() is None, "it goes on"
        assert (job.state, job.current_size) == (pb.JOB_CANCELLED, DISK)
        assert _came_to_its_end(balance)
    assert support.hashes(guest.mountpoint) == before
