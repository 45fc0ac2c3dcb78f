"""What an administrator does between reports: the limit must hold again within 3 s."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

from lab.attack.oracle import SHOWN, available, reach
from lab.attack.registry import add, scenario
from lab.attack.testbed import Testbed, mib, report, sync, why
from lab.daemon import Daemon
from lab.loop import Guest, run
from storaged.units import GIB, MIB

WITHIN_S = 3.0
SIZE = 4 * GIB
SUBVOLUME = ".storaged-balloon"


def kept_again(bed: Testbed, guest: Guest, daemon: Daemon, limit: int, what: str) -> list[str]:
    """Whether what can be written is back at the limit within 3 s and stays there; how long it took is printed.

    statvfs is only true after a commit, and a deleted subvolume is freed by the kernel's cleaner.
    """
    begun = time.monotonic()
    highest, last_over, found = 0, 0.0, 0
    while (now := time.monotonic() - begun) < WITHIN_S + 1:
        sync(guest)
        found = reach(guest, 0) or 0
        highest = max(highest, found)
        if found > limit + SHOWN:
            last_over = now
        time.sleep(0.05)
    bed.say(
        what=what,
        limit=mib(limit),
        highest=mib(highest),
        now=mib(found),
        over_for_s=round(last_over, 2),
        says=why(daemon),
    )
    if last_over > WITHIN_S:
        return [f"{what}: {mib(found)} MiB can be written after {last_over:.1f} s, {mib(limit)} allowed"]
    return []


def _grown(guest: Guest) -> None:
    guest.resize_image(guest.image.stat().st_size + SIZE)
    run("btrfs", "filesystem", "resize", "max", guest.mountpoint)


def _deleted(guest: Guest) -> None:
    run("btrfs", "-q", "subvolume", "delete", guest.mountpoint / SUBVOLUME)


def _files_deleted(guest: Guest) -> None:
    for path in (guest.mountpoint / SUBVOLUME).iterdir():
        path.unlink()


def _truncated(guest: Guest) -> None:
    for path in (guest.mountpoint / SUBVOLUME).iterdir():
        os.truncate(path, 0)


def _renamed(guest: Guest) -> None:
    (guest.mountpoint / SUBVOLUME).rename(guest.mountpoint / "put-aside")
    run("btrfs", "-q", "subvolume", "delete", guest.mountpoint / "put-aside")


def between_reports(bed: Testbed, do: Callable[[Guest], None], what: str) -> list[str]:
    """An administrator's command between two reports: the limit holds again within 3 s, and the next answer is true."""
    guest = bed.guest(SIZE)
    daemon = bed.daemon(guest)
    faults = []
    for limit in (300 * MIB,) if bed.quick else (300 * MIB, 0):
        if not report(daemon, limit):
            faults.append(f"{what}: FAILED for {mib(limit)} MiB: {why(daemon)}")
        do(guest)
        run("btrfs", "subvolume", "sync", guest.mountpoint)
        faults += kept_again(bed, guest, daemon, limit, what)
        success = report(daemon, limit)
        found = reach(guest, 0) or 0
        if success and found > limit + SHOWN:
            faults.append(f"{what}: SUCCESS for {mib(limit)}, {mib(found)} MiB can be written")
        if not success:
            faults.append(f"{what}: FAILED after it: {why(daemon)}")
    return faults


@scenario("balloon-snapshot")
def snapshot(bed: Testbed) -> list[str]:
    """A snapshot of the balloon's subvolume pins its room; the limit is raised; then the snapshot goes."""
    guest = bed.guest(SIZE)
    daemon = bed.daemon(guest)
    faults = []
    for kind in ((), ("-r",)):
        if not report(daemon, 200 * MIB):
            faults.append(f"FAILED before the snapshot: {why(daemon)}")
        pin = guest.mountpoint / "pin"
        run("btrfs", "-q", "subvolume", "snapshot", *kind, guest.mountpoint / SUBVOLUME, pin)
        raised = 800 * MIB
        success = report(daemon, raised)
        bed.say(raised=mib(raised), success=success, available=mib(available(guest) or 0), says=why(daemon))
        run("btrfs", "-q", "subvolume", "delete", "--commit-after", pin)
        run("btrfs", "subvolume", "sync", guest.mountpoint)
        faults += kept_again(bed, guest, daemon, raised, f"snapshot {' '.join(kind)} deleted")
    return faults


@scenario("balloon-reflinked")
def reflinked(bed: Testbed) -> list[str]:
    """The balloon's files are made as long as their extents and copied with --reflink; the copies go later."""
    guest = bed.guest(SIZE)
    daemon = bed.daemon(guest)
    faults = [] if report(daemon, 200 * MIB) else [f"FAILED: {why(daemon)}"]
    copies = guest.mountpoint / "copies"
    for path in (guest.mountpoint / SUBVOLUME).iterdir():
        os.truncate(path, path.stat().st_blocks * 512)
    run("cp", "-a", "--reflink=always", guest.mountpoint / SUBVOLUME, copies)
    sync(guest)
    for limit in (300 * MIB, 100 * MIB):
        success = report(daemon, limit)
        found = reach(guest, 0) or 0
        bed.say(limit=mib(limit), success=success, reach=mib(found), says=why(daemon))
        if success and found > limit + SHOWN:
            faults.append(f"SUCCESS for {mib(limit)} MiB, {mib(found)} MiB can be written")
    for path in copies.iterdir():
        path.unlink()
    return faults + kept_again(bed, guest, daemon, 300 * MIB, "reflinks deleted")


def _register() -> None:
    table = {
        "grown-by-hand": _grown,
        "balloon-deleted": _deleted,
        "balloon-files-deleted": _files_deleted,
        "balloon-truncated": _truncated,
        "balloon-renamed": _renamed,
    }
    for name, do in table.items():
        quick = name in ("grown-by-hand", "balloon-deleted")
        add(name, partial(between_reports, do=do, what=name), quick=quick)


_register()
