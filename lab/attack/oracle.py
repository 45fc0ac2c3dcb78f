"""Decides whether an answer was true: by what the image grows when everything is written, or by what still could be.

The limit is in host bytes. Data is written up to ENOSPC: first all preallocated room that the attack knows of, then
new files, then the preallocated room that was refused before.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import btrfs

from lab.attack.preallocation import Unwritten
from lab.attack.testbed import mib, sync
from lab.loop import Guest, fill
from storaged.units import GIB, MIB

SLACK = 64 * MIB
"""On an idle filesystem."""
NEAR = 4 * MIB
"""What the kernel's own counts may be off by."""
SHOWN = SLACK + NEAR
"""Beyond a limit, by the kernel's counts."""
LOOK_AGAIN_S = 0.05
MOST_PASSES = 12
_ROUND = 16 * MIB


@dataclass(frozen=True, slots=True)
class Growth:
    """What writing everything cost the host. All bytes, of the host."""

    image: int
    data: int
    """File data written, times the copies that the profile makes."""
    metadata: int
    """Metadata in use after it, less that before; 0 where data and metadata share block groups."""

    @property
    def most(self) -> int:
        """The larger of image growth and data: freed blocks that the host has not got back yet may hide growth."""
        return max(self.image, self.data)

    def __str__(self) -> str:
        return f"image {mib(self.image):+d} MiB (data {mib(self.data)}, metadata {mib(self.metadata)})"


class Allocation:
    """The filesystem's own counts, from sysfs."""

    def __init__(self, guest: Guest) -> None:
        fd = os.open(guest.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            uuid = btrfs.ioctl.fs_info(fd).fsid
        finally:
            os.close(fd)
        self._path = Path(f"/sys/fs/btrfs/{uuid}/allocation")
        self.mixed = (self._path / "mixed").is_dir()

    def number(self, kind: str, name: str) -> int:
        """One file; data and metadata are the same where block groups are mixed."""
        kind = "mixed" if self.mixed and kind != "system" else kind
        return int((self._path / kind / name).read_text(encoding="ascii"))

    def data(self) -> int:
        """Bytes of data that are taken, the balloon's with them."""
        return sum(self.number("data", part) for part in ("bytes_used", "bytes_reserved", "bytes_may_use"))

    def copies(self) -> int:
        """Host bytes per byte of data."""
        total = self.number("data", "total_bytes")
        return max(self.number("data", "disk_total") // total, 1) if total else 1

    def metadata(self) -> int:
        """Host bytes of metadata in use."""
        return 0 if self.mixed else self.number("metadata", "disk_used") + self.number("system", "disk_used")

    def metadata_headroom(self) -> int:
        """Metadata bytes that fit before a new chunk is needed."""
        parts = ("bytes_used", "bytes_reserved", "bytes_pinned", "bytes_readonly")
        reserve = int((self._path / "global_rsv_size").read_text(encoding="ascii"))
        return self.number("metadata", "total_bytes") - sum(self.number("metadata", p) for p in parts) - reserve


def data_chunk(guest: Guest) -> int:
    """Host bytes of a data chunk: a tenth of the filesystem, a GiB at most (fs/btrfs/volumes.c), for each copy."""
    copies = Allocation(guest).copies()
    answer = os.statvfs(guest.mountpoint)
    size = answer.f_blocks * answer.f_frsize * copies
    return min(GIB, -(-size // 10 // _ROUND) * _ROUND) * copies


def available(guest: Guest) -> int | None:
    """What statvfs shows an application; None while the kernel's subtraction wraps."""
    answer = os.statvfs(guest.mountpoint)
    return answer.f_bavail * answer.f_frsize if answer.f_bavail <= answer.f_blocks else None


def image_bytes(guest: Guest) -> int:
    """What the image takes from the host, after the guest's filesystem is committed."""
    sync(guest)
    with guest.image.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_blocks * 512


def reach(guest: Guest, unwritten: int) -> int | None:
    """Host bytes that applications can still make the image take, by the kernel's counts; None when unknown."""
    shown = available(guest)
    return None if shown is None else (shown + unwritten) * Allocation(guest).copies()


def over(
    guest: Guest, limit: int, slack: int, unwritten: Callable[[], int] = lambda: 0, *, committed: bool = False
) -> int:
    """The cheap oracle: bytes beyond limit and slack in two looks 50 ms apart; 0 when one of them is within.

    `unwritten` is asked before and after each look, and its lower answer counts: writers may go on meanwhile.
    `committed`: commit before each look, which fallocate(2) needs to be counted in statvfs.
    """
    least: int | None = None
    for look in range(2):
        if look:
            time.sleep(LOOK_AGAIN_S)
        if committed:
            sync(guest)
        before, without = unwritten(), reach(guest, 0)
        if without is None:
            return 0
        found = without + min(before, unwritten()) * Allocation(guest).copies()
        if found <= limit + slack:
            return 0
        least = found if least is None else min(least, found)
    return (least or 0) - limit


def fill_up(guest: Guest, name: str = "oracle") -> list[Path]:
    """Write new files until ENOSPC, again with smaller blocks after commits; the files.

    A reservation for metadata may refuse a write that is possible a commit later.
    """
    made: list[Path] = []
    refused = 0
    for number in range(MOST_PASSES):
        path = guest.mountpoint / f"{name}{number}"
        written, _ = fill(path, None, 1 << 20 if number == 0 else 64 << 10)
        made.append(path)
        refused = refused + 1 if written < MIB else 0
        if refused == 2:
            break
        sync(guest)
    return made


def allocated(paths: Sequence[Path]) -> int:
    """Bytes that lie in `paths`."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


def fill_really(guest: Guest, unwritten: Sequence[Unwritten] = (), *, keep: bool = False) -> Growth:
    """Write everything that can be written, and measure. The new files are deleted afterwards unless `keep`."""
    counts = Allocation(guest)
    copies = counts.copies()
    image, metadata = image_bytes(guest), counts.metadata()
    written = sum(part.write() for part in unwritten)
    made = fill_up(guest)
    written += sum(part.write() for part in unwritten if part.left)
    sync(guest)
    data = (written + allocated(made)) * copies
    growth = Growth(image_bytes(guest) - image, data, counts.metadata() - metadata)
    if not keep:
        for path in made:
            path.unlink(missing_ok=True)
        sync(guest)
    return growth


def judged(growth: Growth, limit: int, slack: int = SLACK, what: str = "") -> list[str]:
    """A fault when the growth is beyond limit and slack."""
    if growth.most <= limit + slack:
        return []
    return [f"{what or 'after SUCCESS'}: {growth}, allowed {mib(limit)} + {mib(slack)}"]
