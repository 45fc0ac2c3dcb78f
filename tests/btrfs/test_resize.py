"""Resizing as a host does it: bounds that hold, sizes that are true, the balloon in step, reasons for every refusal."""

from __future__ import annotations

import statistics
import time

import grpc
import pytest

from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, MIB, SECTOR
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import QUIET, Figures, Sampler, available, held, report_for

pytestmark = pytest.mark.btrfs
STARTED = vm_guest_pb2.ResizeFilesystemResponse.STARTED
ALREADY = vm_guest_pb2.ResizeFilesystemResponse.ALREADY_IN_PROGRESS
NEAR = 16 * MIB
EXPOSED_S = 0.5
"""Most of it for a machine that is busy with something else."""


def _resized(daemon: Daemon, size: int) -> vm_guest_pb2.GetResizeStatusResponse:
    """Ask and wait, as a host does; the last status."""
    assert daemon.resize(size) == STARTED
    return daemon.wait_resized()


def _size_on_disk(guest: Guest) -> int:
    """What the superblock says once the filesystem is unmounted."""
    with guest.image.open("rb") as file:
        file.seek(65536 + 0x70)
        return int.from_bytes(file.read(8), "little")


@pytest.mark.once
def test_there_and_back(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(2 * GIB, device_size=8 * GIB)
    fill(guest.mountpoint / "data", 100 * MIB)
    before = support.hashes(guest.mountpoint)
    daemon = make_daemon(guest)
    status = daemon.status()
    assert (status.resize_in_progress, status.current_size, status.target_size) == (False, 2 * GIB, 2 * GIB)
    # The second and third are no multiple of a sector: the wire echoes them, the filesystem rounds down.
    for size in (6 * GIB, 3 * GIB + 1, 5 * GIB + SECTOR - 1, 8 * GIB, 2 * GIB, 2 * GIB):
        status = _resized(daemon, size)
        assert (status.current_size, status.target_size) == (size, size)
        report = daemon.report()
        assert (report.job.state, report.job.reason) == (storaged_v1_pb2.JOB_DONE, "")
        assert report.job.progress == 1.0
    daemon.stop()
    again = make_daemon(guest)
    status = again.status()
    assert (status.resize_in_progress, status.current_size, status.target_size) == (False, 2 * GIB, 2 * GIB)
    again.stop()
    assert support.hashes(guest.mountpoint) == before
    guest.unmount()
    guest.check()
    assert _size_on_disk(guest) == 2 * GIB


def test_an_odd_size_is_echoed_after_a_restart(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB, device_size=4 * GIB)
    daemon = make_daemon(guest)
    assert _resized(daemon, 3 * GIB + 1).current_size == 3 * GIB + 1
    daemon.kill()
    assert make_daemon(guest).status().current_size == 3 * GIB + 1


@pytest.mark.parametrize("event", [True, False])
def test_a_grow_waits_for_its_device(
    event: bool, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    # With polling made slow only the kernel's event can start it in time.
    wait = "capacity_wait_s = 60\ncapacity_poll_s = 50\n" if event else "capacity_wait_s = 60\ncapacity_poll_s = 0.1\n"
    guest = make_guest(GIB)
    daemon = make_daemon(guest, config=QUIET + wait)
    assert daemon.resize(3 * GIB) == STARTED
    for _ in range(5):
        status = daemon.status()
        assert (status.resize_in_progress, status.current_size, status.target_size) == (True, GIB, 3 * GIB)
        time.sleep(0.05)
    assert daemon.report().job.state == storaged_v1_pb2.JOB_WAITING_FOR_CAPACITY
    assert daemon.resize(2 * GIB) == ALREADY
    assert daemon.resize(3 * GIB) == ALREADY
    guest.resize_image(2 * GIB)  # not yet enough
    time.sleep(0.3)
    assert daemon.status().resize_in_progress
    guest.resize_image(4 * GIB)
    began = time.monotonic()
    assert daemon.wait_resized(20).current_size == 3 * GIB
    figures.note(by_event=event, started_and_done_after_s=round(time.monotonic() - began, 3))
    assert available(guest) > 2 * GIB


def test_a_filesystem_follows_its_device_where_that_is_wanted(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest, config=QUIET + "auto_grow = true\ncapacity_poll_s = 50\n")
    assert daemon.status().current_size == GIB
    guest.resize_image(3 * GIB)  # nobody asks for it: only the kernel's event can tell
    support.until(lambda: daemon.status().current_size == 3 * GIB, within_s=10)
    assert available(guest) > 2 * GIB


def test_capacity_that_never_comes(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest, config=QUIET + "capacity_wait_s = 1\n")
    status = _resized(daemon, 3 * GIB)
    assert (status.current_size, status.target_size) == (GIB, 3 * GIB)
    job = daemon.report().job
    assert job.state == storaged_v1_pb2.JOB_FAILED
    assert str(GIB) in job.reason
    assert str(3 * GIB) in job.reason
    assert "did not grow within 1 s" in job.reason
    guest.resize_image(4 * GIB)  # too late for that job, in time for the next
    time.sleep(0.3)
    assert daemon.status().current_size == GIB
    assert _resized(daemon, 3 * GIB).current_size == 3 * GIB


def test_refusals_name_the_numbers_and_change_nothing(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(2 * GIB)
    fill(guest.mountpoint / "data", 600 * MIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(300 * MIB)) == vm_guest_pb2.SUCCESS
    minimum, shown, size = daemon.minimum(), available(guest), held(guest)
    assert minimum > 600 * MIB
    for asked, code, named in (
        (0, grpc.StatusCode.INVALID_ARGUMENT, 256 * MIB),
        (1, grpc.StatusCode.INVALID_ARGUMENT, 256 * MIB),
        (256 * MIB - 1, grpc.StatusCode.INVALID_ARGUMENT, 256 * MIB),
        (2**64 - 1, grpc.StatusCode.INVALID_ARGUMENT, 2**63 - 1),
        (256 * MIB, grpc.StatusCode.OUT_OF_RANGE, minimum),
        (500 * MIB, grpc.StatusCode.OUT_OF_RANGE, minimum),
        (minimum - 1, grpc.StatusCode.OUT_OF_RANGE, minimum),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            daemon.resize(asked)
        assert refused.value.code() is code
        assert str(asked) in str(refused.value.details())
        assert str(named) in str(refused.value.details())
        status = daemon.status()
        assert (status.resize_in_progress, status.current_size) == (False, 2 * GIB)
    assert (available(guest), held(guest)) == (shown, size)
    assert not support.read_only(guest)


def test_a_read_only_filesystem_is_not_resized(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB, device_size=2 * GIB, mount="ro")
    daemon = make_daemon(guest, "--allow-unsupported")
    for size in (2 * GIB, 900 * MIB):
        with pytest.raises(grpc.RpcError) as refused:
            daemon.resize(size)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "read-only" in str(refused.value.details())
    assert daemon.status().current_size == GIB


SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 12 else []) for seed in range(100)]


@pytest.mark.once
@pytest.mark.parametrize("seed", SEEDS)
def test_the_minimum_is_reached(seed: int, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    inflated = seed % 2 == 0
    profile = ("-m", "single" if seed % 3 == 0 else "dup")
    nodes = ("--nodesize", "4096" if seed % 4 < 2 else "16384")
    size = (512 * MIB, 700 * MIB, GIB, GIB + GIB // 2 + 5 * SECTOR)[seed // 2 % 4]
    guest = make_guest(size, mkfs=(*profile, *nodes))
    did = support.scatter(guest, seed)
    before = support.hashes(guest.mountpoint)
    daemon = make_daemon(guest)
    limit = available(guest) // 3
    if inflated:
        limit += daemon.report().balloon.unwritten_bytes  # what is preallocated can be written anyway
        assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS

    minimum = daemon.minimum()
    assert 256 * MIB <= minimum <= size
    status = _resized(daemon, minimum)

    job = daemon.report().job
    figures.note(
        seed=seed, size=size, minimum=minimum, did=did, inflated=inflated, moved=job.moved_bytes, reason=job.reason
    )
    assert (status.current_size, job.reason) == (minimum, "")
    assert job.state == storaged_v1_pb2.JOB_DONE
    assert not support.read_only(guest)
    assert support.hashes(guest.mountpoint) == before
    if inflated:
        report = daemon.report()
        assert available(guest) <= limit + report.filesystem.data_chunk_bytes
    # It takes writes up to what it shows.
    shown = available(guest)
    written, _ = fill(guest.mountpoint / "probe", 200 * MIB)
    assert written >= min(shown - max(size // 50, 64 * MIB), 200 * MIB)
    assert not support.read_only(guest)
    daemon.stop()
    guest.unmount()
    guest.check()


def test_an_active_swap_file_is_named_and_not_promised_away(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(2 * GIB)
    root = guest.mountpoint
    fill(root / "filler", 1100 * MIB)
    support.sync(guest)
    swap = root / "swap file"
    swap.touch(mode=0o600)
    run("chattr", "+C", swap)
    run("dd", "if=/dev/zero", f"of={swap}", "bs=1M", "count=300")  # more than the chunks below have left
    run("mkswap", swap)
    (root / "filler").unlink()
    fill(root / "small", 50 * MIB)
    support.sync(guest)
    daemon = make_daemon(guest)
    without = daemon.minimum()
    run("swapon", "-p", "0", swap)
    try:
        minimum = daemon.minimum()
        assert minimum > without
        report = daemon.report()
        assert "swap file" in report.bounds.why
        assert _resized(daemon, minimum).current_size == minimum
        daemon.storage.Resize(storaged_v1_pb2.ResizeRequest(size_bytes=256 * MIB, best_effort=True), timeout=20)
        daemon.wait_resized()
        job = daemon.report().job
        assert (job.state, "swap file" in job.reason) == (storaged_v1_pb2.JOB_DONE, True), job
    finally:
        run("swapoff", swap)
    daemon.stop()


@pytest.mark.once
def test_a_best_effort_goes_on_where_the_promise_ends(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(4 * GIB)
    run("btrfs", "filesystem", "sync", guest.mountpoint)
    # Files of 96 MiB, two of three deleted: every chunk is left with room that is scattered.
    for number in range(30):
        fill(guest.mountpoint / f"data{number}", 96 * MIB)
    run("btrfs", "filesystem", "sync", guest.mountpoint)
    for number in range(30):
        if number % 3:
            (guest.mountpoint / f"data{number}").unlink()
    run("btrfs", "filesystem", "sync", guest.mountpoint)
    before = support.hashes(guest.mountpoint)
    daemon = make_daemon(guest)
    minimum = daemon.minimum()
    request = storaged_v1_pb2.ResizeRequest(size_bytes=256 * MIB, best_effort=True)
    job = daemon.storage.Resize(request, timeout=20).job
    daemon.wait_resized()
    report = daemon.report()
    assert (report.job.id, report.job.state, report.job.progress) == (job.id, storaged_v1_pb2.JOB_DONE, 1.0)
    assert 256 * MIB < report.job.current_size == report.filesystem.size_bytes <= minimum
    assert report.job.reason
    assert not report.filesystem.read_only
    assert report.filesystem.exclusive_operation == "none"
    daemon.stop()
    assert support.hashes(guest.mountpoint) == before
    guest.unmount()
    guest.check()
    assert _size_on_disk(guest) == report.job.current_size


@pytest.mark.once
def test_a_best_effort_is_cancelled_at_a_size_that_is_true(
    make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    took: list[float] = []
    guest = make_guest(8 * GIB)
    support.scatter(guest, 10)
    before = support.hashes(guest.mountpoint)
    daemon = make_daemon(guest)
    request = storaged_v1_pb2.ResizeRequest(size_bytes=256 * MIB, best_effort=True)
    for delay in (0.0, 0.05, 0.2, 0.35, 0.5):
        daemon.storage.Resize(request, timeout=20)
        time.sleep(delay)
        began = time.monotonic()
        try:
            job = daemon.storage.CancelResize(storaged_v1_pb2.CancelResizeRequest(), timeout=20).job
            took.append(time.monotonic() - began)
        except grpc.RpcError:  # it was faster
            job = daemon.report().job
        assert job.state in (storaged_v1_pb2.JOB_CANCELLED, storaged_v1_pb2.JOB_DONE), job
        report = daemon.report()
        assert report.filesystem.size_bytes == job.current_size
        assert report.filesystem.exclusive_operation == "none"
        if job.current_size < 8 * GIB:
            _resized(daemon, 8 * GIB)
    daemon.stop()
    figures.note(best_effort_cancels=[round(one, 3) for one in took])
    assert statistics.median(took) < 1
    guest.unmount()
    guest.check(data=True)
    guest.mount()
    assert support.hashes(guest.mountpoint) == before


def test_the_balloon_follows_every_resize(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    guest = make_guest(8 * GIB, device_size=16 * GIB)
    fill(guest.mountpoint / "data", 200 * MIB)
    daemon = make_daemon(guest)
    limit, chunk = 300 * MIB, 0

    def settled() -> bool:
        return limit - NEAR <= available(guest) <= limit + chunk

    assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
    for asked in (4 * GIB, 2 * GIB, 6 * GIB, 16 * GIB, 3 * GIB):
        size = max(asked, daemon.minimum())
        # Chunks keep the size they had when the filesystem was larger.
        chunk = max(chunk, daemon.report().filesystem.data_chunk_bytes)
        host = guest.host_bytes()
        shrinks = size < daemon.status().current_size
        with Sampler(lambda: available(guest)) as seen:
            status = _resized(daemon, size)
        assert status.current_size == size, daemon.report().job
        took = support.until(settled, within_s=10)
        # 2^64 wrapped round is the kernel's, during a shrink.
        believable = [value for value in seen.values if value < 1 << 60]
        figures.note(
            resize_to=size,
            most_available=max(believable),
            samples=seen.samples,
            host_growth=guest.host_bytes() - host,
            settled_s=round(took, 3),
            held=held(guest),
        )
        if shrinks:
            assert max(believable) <= limit + chunk + NEAR
        # About a mebibyte of trees a step, until the old ones are discarded; the balloon itself is gibibytes.
        assert guest.host_bytes() - host <= 32 * MIB
        assert abs(daemon.report().balloon.size_bytes - held(guest)) <= MIB


def test_a_grow_is_nobodys_room_for_long(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    # The room a grow brings belongs to the host until it has said otherwise. The kernel shows it to everybody until the
    # balloon has taken it, which is a matter of some 20 ms.
    guest = make_guest(2 * GIB, device_size=16 * GIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS
    with Sampler(lambda: available(guest), pause_s=0) as seen:
        assert _resized(daemon, 16 * GIB).current_size == 16 * GIB
        # Within the slack of one chunk, part of it kept for metadata.
        support.until(lambda: 200 * MIB - NEAR <= available(guest) <= 200 * MIB + GIB, within_s=10)
    over = [(at, value) for at, value in seen.times if value > 200 * MIB + 2 * GIB]
    figures.note(grow_most_available=max(seen.values), exposed_samples=len(over), exposed_s=seen.longest(over))
    assert seen.samples > 100
    assert seen.longest(over) <= EXPOSED_S


def test_the_status_answers_while_a_resize_runs(
    make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest = make_guest(64 * GIB)
    fill(guest.mountpoint / "data", 100 * MIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(0)) == vm_guest_pb2.SUCCESS
    target = max(daemon.minimum(), 2 * GIB)
    assert daemon.resize(target) == STARTED
    seen: list[int] = []
    slowest = 0.0
    while True:
        began = time.monotonic()
        status = daemon.status()
        slowest = max(slowest, time.monotonic() - began)
        seen.append(status.current_size)
        assert status.target_size == target
        if not status.resize_in_progress:
            break
    figures.note(polls=len(seen), slowest_s=round(slowest, 4), sizes=len(set(seen)))
    assert seen[-1] == target, daemon.report().job
    assert seen == sorted(seen, reverse=True)
    assert slowest < 5
    job = daemon.report().job
    assert (job.state, job.requested_size) == (storaged_v1_pb2.JOB_DONE, target)
