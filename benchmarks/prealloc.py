"""How long it takes to find unwritten extents among a million files, against a walk that asks FIEMAP of each file."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time
from pathlib import Path

from benchmarks.measure import Goal, Row, in_turns, milliseconds, say
from lab.loop import Guest, run
from storaged.btrfs import ioctl
from storaged.btrfs.prealloc import PreallocScanner
from storaged.units import GIB, KIB

SECTION = "prealloc"
PEER = "walk with FIEMAP"
FILES, QUICK_FILES = 1_000_000, 100_000
FOLDER = 1000
"""Files in each directory; every second one is small enough to lie in its inode's leaf."""
UNWRITTEN_EVERY = 1000
"""One file of so many is preallocated."""
UNWRITTEN = 64 * KIB
CHANGED = 1000
DISK = 40 * GIB
FIRST_S = 60.0
PATIENCE_S = 120.0

FS_IOC_FIEMAP = 0xC020660B
FIEMAP = struct.Struct("=QQLLLL")
"""fiemap: fm_start, fm_length, fm_flags, fm_mapped_extents, fm_extent_count."""
EXTENT = struct.Struct("=QQQQQLLLL")
"""fiemap_extent: logical, physical and length; flags."""
EXTENTS = 32
EXTENT_LAST, EXTENT_UNWRITTEN = 1, 1 << 11
FULL = (1 << 64) - 1


def unwritten_by_walk(folder: str) -> int:
    """Bytes of unwritten extents, asked of every file below `folder`."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += unwritten_by_walk(entry.path)
            elif entry.is_file(follow_symlinks=False):
                fd = os.open(entry.path, os.O_RDONLY)
                try:
                    total += _unwritten(fd)
                finally:
                    os.close(fd)
    return total


def _unwritten(fd: int) -> int:
    total = start = 0
    while True:
        buffer = bytearray(FIEMAP.pack(start, FULL - start, 0, 0, EXTENTS, 0) + bytes(EXTENT.size * EXTENTS))
        fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
        count = FIEMAP.unpack_from(buffer)[3]
        for index in range(count):
            logical, _, length, _, _, flags, *_ = EXTENT.unpack_from(buffer, FIEMAP.size + index * EXTENT.size)
            if flags & EXTENT_UNWRITTEN:
                total += length
            if flags & EXTENT_LAST:
                return total
            start = logical + length
        if not count:
            return total


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disk."""
    count = QUICK_FILES if quick else FILES
    say(f"making {count} files")
    guest = Guest(directory / "prealloc", DISK, mount="noatime")
    try:
        _make(guest.mountpoint, count)
        return _measure(guest, count, turns=2 if quick else 3)
    finally:
        guest.close()


def _make(place: Path, count: int) -> None:
    small, large = b"x" * 100, b"y" * 5000
    for number in range(count // FOLDER):
        folder = place / str(number)
        folder.mkdir()
        directory = os.open(folder, os.O_RDONLY)
        for index in range(FOLDER):
            fd = os.open(f"file-{index:06}.txt", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=directory)
            if (number * FOLDER + index) % UNWRITTEN_EVERY == 0:
                ioctl.fallocate(fd, 0, 0, UNWRITTEN)
            else:
                os.write(fd, large if index % 2 else small)
            os.close(fd)
        os.close(directory)
    os.sync()


def _measure(guest: Guest, count: int, turns: int) -> list[Row]:
    expected = count // UNWRITTEN_EVERY * UNWRITTEN
    first = Row(SECTION, f"{count} files, first look", "s", PEER, Goal(FIRST_S))
    cold = Row(SECTION, f"{count} files, first look, cold", "s", PEER, Goal(FIRST_S))
    incremental = Row(SECTION, f"look after {CHANGED} changed files", "ms", PEER)
    idle = Row(SECTION, "look after nothing", "ms", PEER)

    def walked() -> float:
        began = time.perf_counter()
        found = unwritten_by_walk(str(guest.mountpoint))
        assert found == expected, f"the walk found {found} of {expected} bytes"
        return time.perf_counter() - began

    for turn in range(turns):
        say(f"first look and walk, turn {turn + 1}")
        for row in (cold, first):

            def ours(row: Row = row) -> None:
                _forget(guest, forget=row is cold)
                row.ours.append(_first(guest, expected, row))

            def peer(row: Row = row) -> None:
                _forget(guest, forget=row is cold)
                row.peer.append(walked())

            in_turns(turn, ours, peer)
    whole_ms = [seconds * 1e3 for seconds in first.peer]  # a walk takes as long, whatever has changed
    incremental.peer, idle.peer = list(whole_ms), list(whole_ms)
    fd = os.open(guest.mountpoint, os.O_RDONLY)
    scanner = PreallocScanner(fd)
    try:
        _known(scanner)
        for turn in range(turns * 3):
            say(f"incremental looks, turn {turn + 1}")
            _change(guest.mountpoint, count, turn)
            incremental.ours.append(milliseconds(lambda: _look(scanner, expected)))
            run("btrfs", "filesystem", "sync", guest.mountpoint)
            _look(scanner, expected)
            idle.ours += [milliseconds(lambda: _look(scanner, expected)) for _ in range(20)]
    finally:
        scanner.close()
        os.close(fd)
    return [cold, first, incremental, idle]


def _forget(guest: Guest, *, forget: bool) -> None:
    """Remount, so that nothing is cached; the image itself may still be in the host's memory."""
    if forget:
        guest.unmount()
        ctypes.CDLL(None).sync()
        guest.mount()


def _first(guest: Guest, expected: int, row: Row) -> float:
    """Seconds until the first look knows."""
    fd = os.open(guest.mountpoint, os.O_RDONLY)
    scanner = PreallocScanner(fd)
    try:
        began = time.perf_counter()
        scanner.start()
        _known(scanner)
        took = time.perf_counter() - began
        _look(scanner, expected)
        row.facts["child_memory_bytes"] = _memory(scanner.pid or 0)
        return took
    finally:
        scanner.close()
        os.close(fd)


def _known(scanner: PreallocScanner) -> None:
    while not scanner.look(0, PATIENCE_S).known:
        time.sleep(0.02)


def _look(scanner: PreallocScanner, expected: int) -> None:
    found = scanner.look(0, PATIENCE_S)
    assert found.known, "not known"
    assert found.size == expected, f"found {found.size} of {expected} bytes"


def _change(place: Path, count: int, turn: int) -> None:
    """Append to files all over the filesystem."""
    step = count // CHANGED
    for index in range(CHANGED):
        number = index * step + 1 + turn * 2 % (step - 1)
        with (place / str(number // FOLDER) / f"file-{number % FOLDER:06}.txt").open("ab") as file:
            file.write(b"z" * 5000)
    os.sync()


def _memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * KIB
    return 0
