"""How fast the balloon follows a report, against bare fallocate, truncate and commit of the same size."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.measure import Goal, Row, in_turns, milliseconds, say
from lab.daemon import Daemon
from lab.loop import Guest
from storaged.btrfs import ioctl
from storaged.core.model import Config
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB

SECTION = "balloon"
SIZES = (1, 16, 64)
DISK = 80 * GIB
CYCLES = 4
"""Inflations and deflations on each new filesystem; the first one has chunks to allocate."""
REACTION_MS = 20.0
PEER = "fallocate or truncate, then commit"
IDLE_DISK = 8 * GIB
GROWTH_MIB = 1.0
SETTLES_S = 1.5
IDLE_REPORTS = (
    (vm_guest_pb2.DISK_LOW, 1152 * MIB),
    (vm_guest_pb2.DISK_CRITICAL, GIB),
    (vm_guest_pb2.DISK_NORMAL, 8 * GIB),
    (vm_guest_pb2.DISK_LOW, 1500 * MIB),
)
SLACK = 2 * GIB
"""Data chunks come in steps: a balloon within two of them is as large as it was to be."""


class BareFile:
    """What the balloon is made of, and nothing else."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT, 0o600)

    def inflate(self, size: int) -> None:
        """Take `size` bytes, and wait until that is true after a crash."""
        ioctl.fallocate(self._fd, ioctl.FALLOC_FL_KEEP_SIZE, 0, size)
        ioctl.sync(self._fd)

    def deflate(self) -> None:
        """Give everything back, as lasting."""
        os.ftruncate(self._fd, 0)
        ioctl.sync(self._fd)

    def close(self) -> None:
        """Let go of the filesystem."""
        os.close(self._fd)


class Host:
    """Sends the reports that make one daemon's balloon a given size."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._available = daemon.report().filesystem.available_bytes
        self._reserve = Config().reserve

    def allow(self, less: int) -> None:
        """Allow applications `less` bytes less than an empty filesystem has."""
        result = self._daemon.report_free(self._available - less + self._reserve)
        if result != vm_guest_pb2.SUCCESS:
            raise RuntimeError(f"the balloon could not take {less} bytes")

    def check(self, size: int) -> None:
        """Raise RuntimeError unless the balloon has about `size` bytes."""
        held = self._daemon.report().balloon.size_bytes
        if abs(held - size) > SLACK:
            raise RuntimeError(f"the balloon holds {held} bytes, it should hold {size}")


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    rows: list[Row] = []
    for size in SIZES:
        goal = Goal(REACTION_MS) if size == max(SIZES) else None
        first, inflate, deflate = (
            Row(SECTION, f"{size} GiB {what}", "ms", PEER, goal)
            for what in ("inflate, new filesystem", "inflate", "deflate")
        )
        for index in range(2 if quick else 5):
            say(f"balloon of {size} GiB, run {index + 1}")
            _run(directory, size * GIB, index, (first, inflate, deflate))
        rows += [first, inflate, deflate]
    rows.append(_growth(directory, 2 if quick else 5))
    return rows


def _growth(directory: Path, tries: int) -> Row:
    """What a report costs the image of a guest that writes nothing; the same by bare files beside it."""
    row = Row(SECTION, "image growth a report, idle guest", "MiB", PEER, Goal(GROWTH_MIB))
    for index in range(tries):
        say(f"image of an idle guest, run {index + 1}")
        ours, theirs = Guest(directory / "ours", IDLE_DISK), Guest(directory / "theirs", IDLE_DISK)
        bare = BareFile(theirs.mountpoint)
        try:
            with Daemon(directory, stateful=ours.mountpoint) as daemon:
                for level, free in IDLE_REPORTS:
                    before = ours.host_bytes()
                    daemon.report_free(free, level)
                    time.sleep(SETTLES_S)
                    row.ours.append((ours.host_bytes() - before) / MIB)
                    before = theirs.host_bytes()
                    bare.deflate()
                    bare.inflate(IDLE_DISK - GIB)
                    time.sleep(SETTLES_S)
                    row.peer.append((theirs.host_bytes() - before) / MIB)
        finally:
            bare.close()
            for guest in (ours, theirs):
                guest.close()
                guest.mountpoint.rmdir()
    row.facts["worst_mib"] = round(max(row.ours), 2)
    if max(row.ours) > GROWTH_MIB:
        raise RuntimeError(f"an idle guest's image grew by {max(row.ours):.1f} MiB with one report")
    return row


def _run(directory: Path, size: int, index: int, rows: tuple[Row, Row, Row]) -> None:
    first, inflate, deflate = rows
    ours, theirs = Guest(directory / "ours", DISK), Guest(directory / "theirs", DISK)
    bare = BareFile(theirs.mountpoint)
    try:
        with Daemon(directory, stateful=ours.mountpoint) as daemon:
            host = Host(daemon)
            for cycle in range(CYCLES):
                inflated = first if cycle == 0 else inflate

                def one(inflated: Row = inflated) -> None:
                    inflated.ours.append(milliseconds(lambda: host.allow(size)))
                    host.check(size)
                    deflate.ours.append(milliseconds(lambda: host.allow(0)))
                    host.check(0)

                def other(inflated: Row = inflated) -> None:
                    inflated.peer.append(milliseconds(lambda: bare.inflate(size)))
                    deflate.peer.append(milliseconds(bare.deflate))

                in_turns(index + cycle, one, other)
    finally:
        bare.close()
        for guest in (ours, theirs):
            guest.close()
            guest.mountpoint.rmdir()
