"""A disk that remembers every write and every flush, in order, so that a power cut can be played at any of them.

qemu-storage-daemon's `blklogwrites` driver keeps the log, FUSE exports the disk as a file, and a buffered loop device
makes a block device of it. The log's format is that of the kernel's dm-log-writes target
(Documentation/admin-guide/device-mapper/log-writes.rst): a superblock, then one sector that describes an entry and the
data behind it, again and again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.loop import run
from storaged.btrfs import ioctl
from storaged.units import SECTOR

MAGIC = 0x6A736677736872
VERSION = 1
LOG_SECTOR = 512
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
STARTS_WITHIN_S = 20.0
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")

SUPERBLOCK = 64 * 1024
_BTRFS_MAGIC = b"_BHRfS_M"


def why_not() -> str:
    """Why no write log can be kept here; empty when one can."""
    missing = [tool for tool in ("qemu-storage-daemon", "setpriv") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    return "" if Path("/dev/fuse").exists() else "needs /dev/fuse"


@dataclass(frozen=True, slots=True)
class Entry:
    """One request to the disk; all in bytes. `data` is where its data begins in the log, `end` where the entry ends."""

    offset: int
    length: int
    flags: int
    data: int
    end: int

    @property
    def flushes(self) -> bool:
        """True when everything that was written before it is on the disk for good."""
        return bool(self.flags & (FLUSH | FUA))

    @property
    def writes(self) -> bool:
        """True when it carries data."""
        return not self.flags & (DISCARD | MARK) and self.length > 0


def entries(log: Path) -> Iterator[Entry]:
    """Every whole entry of the log, in order. Raises ValueError when it is none."""
    size = log.stat().st_size
    with log.open("rb") as file:
        magic, version, _, sector = _SUPER.unpack(file.read(_SUPER.size))
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError(f"{log} is not a write log")
        at = sector
        # The superblock's count lags behind; whatever is whole counts. An empty header was never written.
        while at + sector <= size:
            file.seek(at)
            first, count, flags, described = _ENTRY.unpack(file.read(_ENTRY.size))
            if not count and not flags:
                return
            length, data = count * sector, at + sector
            at = data + (0 if flags & DISCARD else described if flags & MARK else length)
            if at > size:
                return
            yield Entry(first * sector, length, flags, data, at)


class Replay:
    """Plays entries of `log` onto `image`, a file of the disk's size that holds what the disk held at first."""

    def __init__(self, log: Path, image: Path) -> None:
        self.log = log
        self.image = image
        self._log = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        self._image = os.open(image, os.O_RDWR | os.O_CLOEXEC)

    def apply(self, entry: Entry, keep: int | None = None) -> None:
        """Play one entry, of a write no more than the first `keep` bytes."""
        if entry.flags & DISCARD:
            mode = ioctl.FALLOC_FL_KEEP_SIZE | ioctl.FALLOC_FL_PUNCH_HOLE
            ioctl.fallocate(self._image, mode, entry.offset, entry.length)
        elif entry.writes:
            length = entry.length if keep is None else min(entry.length, keep)
            os.pwrite(self._image, os.pread(self._log, length, entry.data), entry.offset)

    def copy_to(self, target: Path) -> Replay:
        """A replay of the same log on a copy of the image as it is now."""
        run("cp", "--sparse=always", "--reflink=auto", self.image, target)
        return Replay(self.log, target)

    def close(self) -> None:
        """Let go of both files; they stay."""
        os.close(self._log)
        os.close(self._image)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_let_go(image: Path, within_s: float = 10.0) -> None:
    """Wait until no other copy of the image's filesystem is mounted: the kernel would give this one another id.

    Raises RuntimeError when somebody holds it.
    """
    with image.open("rb") as file:
        file.seek(SUPERBLOCK + 0x20)
        mounted = Path("/sys/fs/btrfs") / str(uuid.UUID(bytes=file.read(16)))
    until = time.monotonic() + within_s
    while mounted.exists():
        if time.monotonic() > until:
            raise RuntimeError(
                f"{mounted.name} is still mounted, maybe in another namespace; what follows would mislead"
            )
        time.sleep(0.02)


def torn(window: Sequence[Entry], dice: random.Random) -> list[tuple[Entry, int | None]]:
    """A random part of the requests that no flush has followed, as `Replay.apply` takes them.

    Each may be there, be missing, or have been cut at a sector of the filesystem: the disk keeps no order before a
    flush. How much survives is random too, from nearly nothing to nearly all.
    """
    share = dice.choice([0.1, 0.5, 0.9])
    kept: list[tuple[Entry, int | None]] = []
    for entry in window:
        if dice.random() >= share:
            continue
        cut = None
        if entry.writes and entry.length > SECTOR and dice.random() < 0.2:
            cut = dice.randrange(SECTOR, entry.length, SECTOR)
        kept.append((entry, cut))
    return kept


def committed_sizes(log: Path, found: Sequence[Entry]) -> list[tuple[int, int]]:
    """(end of the entry, bytes the filesystem has) of each superblock in which the size changed, in order."""
    sizes: list[tuple[int, int]] = []
    with log.open("rb") as file:
        for entry in found:
            if not entry.writes or not entry.offset <= SUPERBLOCK < entry.offset + entry.length:
                continue
            file.seek(entry.data + SUPERBLOCK - entry.offset)
            block = file.read(SECTOR)
            if block[0x40:0x48] != _BTRFS_MAGIC:
                continue
            size = int.from_bytes(block[0x70:0x78], "little")
            if not sizes or sizes[-1][1] != size:
                sizes.append((entry.end, size))
    return sizes


class LoggedDisk:
    """The disk in `data`, whose writes from `start` on go into `log` too, as the block device `device`."""

    def __init__(self, directory: Path, data: Path) -> None:
        self.data = data
        self.log = directory / "writes.log"
        self.device = ""
        self._export = directory / "export"
        self._said = directory / "qemu-storage-daemon.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Export it. Raises RuntimeError with what qemu-storage-daemon said when it cannot be."""
        self.log.touch()
        self._export.touch()
        command = [
            # It goes with its owner, whatever ends that one: its mounts can then be cleared, its loop device detached.
            *("setpriv", "--pdeathsig", "KILL", "qemu-storage-daemon"),
            *("--blockdev", f"driver=file,node-name=data,filename={self.data},discard=unmap"),
            *("--blockdev", f"driver=file,node-name=log,filename={self.log}"),
            "--blockdev",
            f"driver=blklogwrites,node-name=disk,file=data,log=log,log-sector-size={LOG_SECTOR},discard=unmap",
            *("--export", f"type=fuse,id=disk,node-name=disk,mountpoint={self._export},writable=on"),
        ]
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        until = time.monotonic() + STARTS_WITHIN_S
        while self._export.stat().st_size != self.data.stat().st_size:
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"qemu-storage-daemon does not export: {self._said.read_text().strip()}")
            time.sleep(0.02)
        self.device = run("losetup", "--show", "-f", "--direct-io=off", self._export)
        return self

    def position(self) -> int:
        """How long the log is: what was flushed to the disk before this call lies in front of it."""
        return self.log.stat().st_size

    def stop(self) -> None:
        """Take the disk away; its filesystem must be unmounted. `data` and `log` stay."""
        if self.device:
            run("losetup", "-d", self.device)
            self.device = ""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        with contextlib.suppress(RuntimeError, OSError):
            if os.path.ismount(self._export):
                run("umount", "-l", self._export)
