"""The balloon's promise: applications can write what the host allows, neither more nor much less."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from lab.loop import Guest, fill
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import Figures, available, report_for

pytestmark = pytest.mark.btrfs

SINGLE = ("-m", "single")
NODES_4K = ("--nodesize", "4096")


def _empty(guest: Guest) -> None:
    """As mkfs left it."""


@dataclass(frozen=True)
class Case:
    """A filesystem with a past, and what its host allows (`limit`)."""

    name: str
    size: int
    limit: int
    age: Callable[[Guest], None] = _empty
    mkfs: tuple[str, ...] = ()
    mount: str = ""
    marks: list[pytest.MarkDecorator] = field(default_factory=list)


def _half_holed(guest: Guest) -> None:
    support.half_holes(guest, min(available(guest) // 2, 60 * MIB))


def _deleted(guest: Guest) -> None:
    support.deletions(guest, available(guest) // 2)


def _snapshots(guest: Guest) -> None:
    support.snapshots(guest, available(guest) // 3)


def _few_snapshots(guest: Guest) -> None:
    support.snapshots(guest, 200 * MIB)


CASES = [
    Case("half a gibibyte, empty", 512 * MIB, 200 * MIB),
    Case("half a gibibyte, nothing allowed", 512 * MIB, 0),
    Case("half a gibibyte, single", 512 * MIB, 150 * MIB, mkfs=SINGLE),
    Case("half a gibibyte, half-holed", 512 * MIB, 100 * MIB, _half_holed, marks=[pytest.mark.slow]),
    Case("half a gibibyte, nearly full", 512 * MIB, 10 * MIB, support.nearly_full),
    Case("half a gibibyte, mixed", 512 * MIB, 200 * MIB, mkfs=("--mixed",)),
    Case("one gibibyte, snapshots", GIB, 300 * MIB, _snapshots),
    Case("one gibibyte, 4K nodes, half-holed", GIB, 200 * MIB, _half_holed, mkfs=NODES_4K),
    Case("one gibibyte, deletions", GIB, 300 * MIB, _deleted),
    Case("one gibibyte, single, deletions", GIB, 300 * MIB, _deleted, mkfs=SINGLE),
    Case("one gibibyte, compressed", GIB, 300 * MIB, _half_holed, mount="compress-force=zstd:1"),
    Case("one gibibyte, nodiscard", GIB, 300 * MIB, _deleted, mount="nodiscard"),
    Case("four gibibytes, nearly full", 4 * GIB, 100 * MIB, support.nearly_full, marks=[pytest.mark.slow]),
    Case("four gibibytes, half-holed", 4 * GIB, 300 * MIB, _half_holed),
    Case("four gibibytes, single, 4K nodes", 4 * GIB, 500 * MIB, mkfs=(*SINGLE, *NODES_4K)),
    Case("four gibibytes, nothing allowed", 4 * GIB, 0, _few_snapshots),
    Case("sixty-four gibibytes, sparse", 64 * GIB, 200 * MIB),
    Case("sixty-four gibibytes, sparse, single", 64 * GIB, 0, _half_holed, mkfs=SINGLE),
    *(
        Case(f"{size // MIB} MiB {profile} {nodes[1]} {age.__name__} {limit // MIB}", size, limit, age,
             ("-m", profile, *nodes), marks=[pytest.mark.slow])
        for size in (512 * MIB, GIB, 4 * GIB)
        for profile in ("single", "dup")
        for nodes in (NODES_4K, ("--nodesize", "16384"))
        for age in (_empty, _half_holed, support.nearly_full, _snapshots, _deleted)
        for limit in (0, size // 3)
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=case.marks) for case in CASES])
def test_after_success_exactly_the_limit_can_be_written(
    case: Case, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest = make_guest(case.size, mkfs=case.mkfs, mount=case.mount)
    case.age(guest)
    support.sync(guest)
    # Where metadata is full nobody can write until the kernel's cleaner comes by: nothing to hold down yet.
    support.until(lambda: available(guest) > 0, within_s=60)
    before = available(guest)
    daemon = make_daemon(guest)

    assert daemon.report_free(report_for(case.limit)) == vm_guest_pb2.SUCCESS, daemon.report().balloon

    shown, answered = available(guest), daemon.available()
    report = daemon.report()
    chunk = report.filesystem.data_chunk_bytes
    support.sync(guest)
    # What the kernel's cleaner deletes comes back to everybody; the balloon follows within a second or two.
    assert available(guest) - shown <= chunk
    support.until(lambda: available(guest) - shown <= support.TARGET_SLACK, within_s=5)
    written, error = fill(guest.mountpoint / "probe")
    figures.note(
        case=case.name.replace(" ", "_"),
        limit=case.limit,
        before=before,
        shown=shown,
        written=written,
        over=written - case.limit,
        short=min(case.limit, before) - written,
        chunk=chunk,
    )
    assert written <= case.limit + chunk, f"{report} {daemon.report()} {daemon.log.read_text()[-3000:]}"
    allowed = min(case.limit, before)
    if report.balloon.size_bytes:  # else it is the filesystem itself that takes nothing
        assert written >= allowed - max(case.size // 50, 64 * MIB)
    if written < before - max(case.size // 50, 64 * MIB):
        assert error  # it was the balloon that stopped us, and it said so at once
    assert answered == shown
    assert not support.read_only(guest)


def test_what_was_deleted_a_moment_ago_counts(make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    # The kernel has not committed the deletion when the host reports, and counts it as used until then.
    guest = make_guest(2 * GIB)
    fill(guest.mountpoint / "gone", 700 * MIB)
    daemon = make_daemon(guest)
    (guest.mountpoint / "gone").unlink()
    assert daemon.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS, daemon.report().balloon
    support.sync(guest)
    figures.note(fresh_deletion=700 * MIB, limit=200 * MIB, available=available(guest))
    assert available(guest) <= 200 * MIB + daemon.report().filesystem.data_chunk_bytes
    assert available(guest) >= 200 * MIB - 64 * MIB


def test_the_default_configuration_keeps_the_promise_too(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest, "--release", config=None)
    for free, limit in ((0, 0), (GIB + 100 * MIB, 100 * MIB), (3 * GIB // 2, GIB // 2)):
        assert daemon.report_free(free, vm_guest_pb2.DISK_CRITICAL) == vm_guest_pb2.SUCCESS, daemon.report().balloon
        assert available(guest) <= limit + daemon.report().filesystem.data_chunk_bytes
        assert available(guest) >= limit - 64 * MIB
    daemon.stop()


def test_a_host_that_does_not_know_changes_nothing(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(300 * MIB)) == vm_guest_pb2.SUCCESS
    shown, size = available(guest), support.held(guest)
    for free, state in ((-1, vm_guest_pb2.DISK_NONE), (-1, vm_guest_pb2.DISK_NORMAL), (0, vm_guest_pb2.DISK_NONE)):
        assert daemon.report_free(free, state) == vm_guest_pb2.SUCCESS
        assert (available(guest), support.held(guest)) == (shown, size)


def test_ample_space_needs_no_balloon(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB)
    before = available(guest)
    daemon = make_daemon(guest)
    assert daemon.report_free(100 * GIB) == vm_guest_pb2.SUCCESS
    assert support.held(guest) == 0
    assert abs(available(guest) - before) <= GIB // 10  # metadata may have got a chunk of its usual size


@pytest.mark.parametrize("steps", [(900, 100, 120, 140, 20, 800), (0, 2, 4, 6, 8, 10), (700, 650, 600, 650, 700)])
def test_the_limit_is_kept_through_every_change(
    steps: tuple[int, ...], make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest = make_guest(2 * GIB)
    fill(guest.mountpoint / "data", 200 * MIB)
    before = available(guest)
    daemon = make_daemon(guest)
    for mebibytes in steps:
        limit = mebibytes * MIB
        assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
        shown = available(guest)
        figures.note(step=mebibytes, shown=shown, deviation=shown - limit)
        assert abs(shown - min(limit, before)) <= 16 * MIB
        assert daemon.available() == shown == os.statvfs(guest.mountpoint).f_bavail * 4096


def test_a_restart_gives_nothing_again_that_was_written(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(300 * MIB)) == vm_guest_pb2.SUCCESS
    written, error = fill(guest.mountpoint / "data", 200 * MIB)
    assert (written, error) == (200 * MIB, 0)
    support.sync(guest)
    before = available(guest)
    daemon.kill()
    daemon.start()
    support.until(lambda: daemon.report().balloon.limit_bytes == 300 * MIB)
    support.until(lambda: daemon.report().balloon.state == storaged_v1_pb2.BALLOON_IDLE)
    support.sync(guest)
    assert available(guest) <= before + support.TARGET_SLACK
    assert daemon.report_free(report_for(300 * MIB)) == vm_guest_pb2.SUCCESS
    assert abs(available(guest) - 300 * MIB) <= support.TARGET_SLACK, "the host has spoken again"
