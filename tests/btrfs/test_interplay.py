"""A shrink that moves data, in the middle of everything else that a guest and its host do."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from benchmarks.resize import holed
from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import Figures, available, held, report_for

pytestmark = pytest.mark.btrfs
STARTED = vm_guest_pb2.ResizeFilesystemResponse.STARTED
DISK = 6 * GIB
FILES = 8
LIMIT = 300 * MIB
NEAR = 4 * MIB
TRIES = 2
"""On a busy machine a whole job may pass while nobody who looks at it gets to run."""


def _target(daemon: Daemon) -> int:
    """Half a gibibyte less than needs no moving: what then moves is what the kernel has put there."""
    minimum = daemon.minimum()
    return max(minimum, daemon.report().bounds.guaranteed_size - GIB // 2)


def _aged(make_guest: MakeGuest) -> tuple[Guest, dict[str, str]]:
    guest = make_guest(DISK)
    holed(guest, FILES)
    return guest, {f"file{n}": digest for n, digest in enumerate(_digests(guest)) if digest}


def _digests(guest: Guest) -> list[str]:
    found = support.hashes(guest.mountpoint)
    return [found.get(f"file{number}", "") for number in range(FILES)]


def _whole(guest: Guest, before: dict[str, str]) -> bool:
    after = support.hashes(guest.mountpoint)
    return all(after.get(name) == digest for name, digest in before.items())


def _check(guest: Guest, daemon: Daemon) -> None:
    daemon.stop()
    assert not support.read_only(guest)
    guest.unmount()
    guest.check(data=True)  # what is read below a mount may come from memory


@contextlib.contextmanager
def _repeating(work: object, pause_s: float = 0.0) -> Iterator[list[int]]:
    """Call `work(n)` again and again meanwhile; how often it was through."""
    done = threading.Event()
    through: list[int] = []

    def loop() -> None:
        number = 0
        while not done.is_set():
            with contextlib.suppress(OSError, RuntimeError):
                work(number)  # type: ignore[operator]  # a plain function
                through.append(number)
            number += 1
            done.wait(pause_s)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield through
    finally:
        done.set()
        thread.join()


def _writes(folder: Path, number: int) -> None:
    """A durable file of 8 MiB; the one before the last four goes."""
    with (folder / f"new{number}").open("wb") as file:
        file.write(os.urandom(8 * MIB))
        file.flush()
        os.fsync(file.fileno())
    (folder / f"new{number - 4}").unlink(missing_ok=True)


def _snapshot(guest: Guest, number: int) -> None:
    run("btrfs", "-q", "subvolume", "snapshot", "-r", guest.mountpoint, guest.mountpoint / f"snap{number}")
    run("btrfs", "-q", "subvolume", "delete", guest.mountpoint / f"snap{number}")


def _believable(seen: support.Sampler) -> list[int]:
    """What statvfs showed; in the middle of a change it may show more than any disk has."""
    return [value for value in seen.values if value < 1 << 60]


@pytest.mark.parametrize("beside", ["balloon", "critical", "snapshots"])
def test_it_is_done_beside(beside: str, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    guest, before = _aged(make_guest)
    daemon = make_daemon(guest)
    chunk, limit = daemon.report().filesystem.data_chunk_bytes, 1 << 60
    snapshots: list[int] = []
    with contextlib.ExitStack() as stack:
        if beside == "snapshots":
            snapshots = stack.enter_context(_repeating(lambda number: _snapshot(guest, number), 0.1))
        else:
            level = vm_guest_pb2.DISK_CRITICAL if beside == "critical" else vm_guest_pb2.DISK_LOW
            limit = chunk
            assert daemon.report_free(report_for(limit), level) == vm_guest_pb2.SUCCESS
            assert held(guest) > GIB
        seen = stack.enter_context(support.Sampler(lambda: available(guest)))
        target = daemon.minimum()
        assert daemon.resize(target) == STARTED
        status = daemon.wait_resized()
    job, least = daemon.report().job, min(seen.values)
    last = available(guest)
    figures.note(beside=beside, moved=job.moved_bytes, snapshots=len(snapshots), least=least, last=last)
    assert (job.state, status.current_size) == (pb.JOB_DONE, target), job
    assert job.moved_bytes > 0
    assert bool(snapshots) == (beside == "snapshots")
    assert max(_believable(seen)) <= limit + 2 * chunk
    assert _whole(guest, before)
    _check(guest, daemon)


def test_applications_keep_what_they_may_write(
    make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest = make_guest(16 * GIB)
    fill(guest.mountpoint / "file", 200 * MIB)
    daemon = make_daemon(guest)
    chunk = daemon.report().filesystem.data_chunk_bytes
    limit = 3 * chunk
    assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
    with support.Sampler(lambda: available(guest)) as seen:
        assert daemon.resize(6 * GIB) == STARTED
        assert daemon.wait_resized().current_size == 6 * GIB
    last = available(guest)
    figures.note(limit=limit, chunk=chunk, least=min(seen.values), most=max(_believable(seen)), last=last)
    assert last >= limit - chunk, "the smaller disk has as much"
    assert min(seen.values) >= limit - 2 * chunk, "also in between"
    assert max(_believable(seen)) <= limit + chunk + NEAR


def test_at_critical_with_a_balloon_a_writer_and_snapshots(
    make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest, before = _aged(make_guest)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(LIMIT), vm_guest_pb2.DISK_CRITICAL) == vm_guest_pb2.SUCCESS
    assert held(guest) > GIB
    target, chunk = _target(daemon), daemon.report().filesystem.data_chunk_bytes

    with (
        _repeating(lambda number: _writes(guest.mountpoint, number)) as written,
        _repeating(lambda number: _snapshot(guest, number), 0.1) as snapshots,
        support.Sampler(lambda: available(guest)) as seen,
    ):
        time.sleep(0.3)
        assert daemon.resize(target) == STARTED
        status = daemon.wait_resized()
    job = daemon.report().job
    believable = _believable(seen)
    figures.note(
        moved=job.moved_bytes, outcome=job.state, size=status.current_size, target=target, files=len(written),
        snapshots=len(snapshots), most_available=max(believable),
    )  # fmt: skip
    # The guest may have taken the room that was certain when it was asked: then the truth is said, and a size reached.
    assert job.state == pb.JOB_DONE or (job.state == pb.JOB_FAILED and job.reason), job
    assert status.current_size == (target if job.state == pb.JOB_DONE else daemon.status().current_size)
    assert written
    assert snapshots
    assert max(believable) <= LIMIT + 2 * chunk, "nobody gets room that the host was promised"
    assert _whole(guest, before)
    _check(guest, daemon)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("whom", [pytest.param("daemon", marks=SLOW), pytest.param("child", marks=SLOW), "both"])
def test_asleep_in_the_middle(whom: str, make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    # What a suspended machine looks like from inside: everybody stops, and goes on some time later.
    guest, before = _aged(make_guest)
    daemon = make_daemon(guest)
    target = _target(daemon)
    assert daemon.resize(target) == STARTED
    pids = {"daemon": [daemon.pid], "child": daemon.children("resize_worker")}
    pids["both"] = pids["daemon"] + pids["child"]
    for _ in range(3):
        time.sleep(0.05)
        for pid in pids[whom]:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)
        for pid in pids[whom]:
            os.kill(pid, signal.SIGCONT)
    assert daemon.wait_resized().current_size == target, daemon.report().job
    assert _whole(guest, before)
    _check(guest, daemon)


def _followed(daemon: Daemon, target: int) -> list[pb.Job]:
    """The job as it was told, from its beginning to its end, as often as it can be asked for."""
    assert daemon.resize(target) == STARTED
    jobs: list[pb.Job] = []
    while not jobs or jobs[-1].state in (pb.JOB_PREPARING, pb.JOB_RUNNING):
        jobs.append(daemon.report().job)
    return jobs


def test_progress_is_honest(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    between: list[int] = []
    while max(between, default=0) < 2:
        assert len(between) < TRIES, f"as good as nothing was told of what moved within a cut: {between}"
        guest, before = _aged(make_guest)
        daemon = make_daemon(guest)
        target = daemon.minimum()  # half a gibibyte less may move next to nothing, as the kernel has laid things out
        jobs = _followed(daemon, target)
        running, last = jobs[:-1], jobs[-1]
        assert (last.state, last.progress, last.current_size) == (pb.JOB_DONE, 1.0, target)
        assert all(job.progress < 1 for job in running)
        for values in ([job.progress for job in jobs], [job.moved_bytes for job in jobs]):
            assert values == sorted(values), "never backwards"
        between.append(len({job.moved_bytes for job in jobs}) - len({job.current_size for job in jobs}))
        figures.note(
            moved=last.moved_bytes, to_move=last.total_to_move_bytes, reports=len(jobs), between=between[-1],
            took_s=round(last.ended_at.ToNanoseconds() / 1e9 - last.started_at.ToNanoseconds() / 1e9, 2),
        )  # fmt: skip
        assert last.moved_bytes <= last.total_to_move_bytes
        assert _whole(guest, before)
        daemon.stop()
        guest.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_time_left_at_half_way(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    off: list[float] = []
    for _ in range(3):
        guest = make_guest(14 * GIB)
        for number in range(44):  # 11 GiB, of which the lower half is deleted
            fill(guest.mountpoint / f"file{number}", 256 * MIB)
        for number in range(22):
            (guest.mountpoint / f"file{number}").unlink()
        support.sync(guest)
        daemon = make_daemon(guest)
        target = daemon.minimum()
        assert daemon.resize(target) == STARTED
        guesses: list[tuple[float, float]] = []
        while (job := daemon.report().job).state in (pb.JOB_PREPARING, pb.JOB_RUNNING):
            if job.HasField("eta_s") and 0.45 <= job.moved_bytes / max(job.total_to_move_bytes, 1) <= 0.55:
                guesses.append((time.monotonic(), job.eta_s))
            time.sleep(0.05)
        ended = time.monotonic()
        assert job.state == pb.JOB_DONE, job
        assert job.moved_bytes >= 4 * GIB
        off.append(statistics.median(abs(eta - (ended - at)) / (ended - at) for at, eta in guesses))
        figures.note(moved=job.moved_bytes, off=round(off[-1], 2), guesses=len(guesses))
        daemon.stop()
        guest.close()
    assert statistics.median(off) <= 0.3, off


def _cancel(daemon: Daemon) -> list[float]:
    """How long the answer took; nothing when the job was over before."""
    began = time.monotonic()
    try:
        daemon.storage.CancelResize(pb.CancelResizeRequest(), timeout=20)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
            raise
        return []
    return [time.monotonic() - began]


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_cancel_at_any_moment(rounds: int, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    guest, before = _aged(make_guest)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(LIMIT)) == vm_guest_pb2.SUCCESS
    took: list[float] = []
    for number in range(rounds):
        start, target = daemon.status().current_size, _target(daemon)
        assert daemon.resize(target) == STARTED
        time.sleep(number / rounds * 0.6)
        took += _cancel(daemon)
        job = daemon.report().job
        status = daemon.status()
        assert not status.resize_in_progress
        assert target <= status.current_size <= start
        assert job.state in (pb.JOB_CANCELLED, pb.JOB_DONE), job
        assert status.current_size == job.current_size
        assert daemon.resize(DISK) == STARTED
        assert daemon.wait_resized().current_size == DISK
    figures.note(cancels=len(took), slowest_s=round(max(took, default=0), 3))
    assert took
    assert sorted(took)[len(took) * 9 // 10] < 1
    assert _whole(guest, before)
    _check(guest, daemon)
