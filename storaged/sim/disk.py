"""A btrfs in memory: chunks of a tenth of the filesystem, a balloon that takes data room, a resize that moves.

It keeps to what the real one was measured to do: first fit in data chunks, then a new chunk in the lowest hole;
all-or-nothing preallocation; emptied chunks stay allocated until they are reclaimed; a shrink must find room below
the new end for everything above it, makes new chunks only while all chunks together are smaller than the new size,
and keeps one data chunk while no data is used. Logical addresses are device offsets (single profile).
"""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass

from storaged.core.model import Space
from storaged.errors import FilesystemError, Kind
from storaged.resize.layout import KERNEL_MINIMUM, Chunk, Layout
from storaged.sim.faults import Faults
from storaged.units import GIB, MIB, SECTOR, sector_floor

METADATA_STEP = 16 * MIB


@dataclass(slots=True)
class _Chunk:
    start: int
    length: int
    kind: str
    used: int = 0  # by applications or metadata
    held: int = 0  # by the balloon, at the end of the chunk

    @property
    def free(self) -> int:
        return self.length - self.used - self.held


class SimDisk:
    """The disk and its filesystem; `write`, `delete` and `set_device` are what guest and host do to it."""

    def __init__(self, size: int = 8 * GIB, device: int | None = None) -> None:
        self.lock = threading.RLock()
        self.faults = Faults()
        self.size = size
        self.device = device if device is not None else size
        self.read_only = False
        self.exclusive_operation = "none"
        self.freed = 0  # since the last commit: no trim reaches it yet
        self.untrimmed = 0
        self.written = 0
        self.speed: float | None = None  # bytes a second that a shrink moves; None is at once
        self.cancelled = threading.Event()
        self.chunks: list[_Chunk] = [
            _Chunk(MIB, 8 * MIB, "system"),
            _Chunk(9 * MIB, min(size // 10 // 65536 * 65536, 256 * MIB), "metadata", used=128 * 1024),
        ]

    @property
    def data_chunk(self) -> int:
        """The length of a new data chunk."""
        return min(GIB, self.size // 10 // 65536 * 65536)

    def of(self, kind: str) -> list[_Chunk]:
        """All chunks of a kind, lowest first."""
        return sorted((c for c in self.chunks if c.kind == kind), key=lambda c: c.start)

    def hole(self, most: int, below: int) -> tuple[int, int] | None:
        """The lowest hole on the device that ends at or before `below`: (start, length up to `most`)."""
        at = MIB
        for chunk in [*sorted(self.chunks, key=lambda c: c.start), None]:
            end = min(chunk.start if chunk else below, below)
            room = (end - at) // SECTOR * SECTOR
            if room >= MIB:
                return at, min(room, most)
            if chunk is None or chunk.start >= below:
                return None
            at = max(at, chunk.start + chunk.length)
        return None

    def roomiest(self, wanted: int, below: int) -> tuple[int, int] | None:
        """The lowest hole of at least `wanted` bytes below an address, or else the longest: (start, length)."""
        at, longest = MIB, (0, 0)
        for chunk in [*sorted(self.chunks, key=lambda c: c.start), None]:
            end = min(chunk.start if chunk else below, below)
            if end - at >= wanted:
                return at, wanted
            longest = max(longest, ((end - at) // SECTOR * SECTOR, at))
            at = max(at, chunk.start + chunk.length) if chunk else at
        return (longest[1], longest[0]) if longest[0] >= MIB else None

    def unallocated(self) -> int:
        """Bytes that can become chunks; smaller holes than 1 MiB do not count."""
        return max(self.size - MIB - sum(c.length for c in self.chunks), 0)

    def data_free(self) -> int:
        """Bytes that fit into the data chunks there are."""
        return sum(c.free for c in self.of("data"))

    def place(self, size: int, below: int) -> list[tuple[_Chunk, int]] | None:
        """Where `size` bytes of data go, below an address; None when they do not fit. Makes chunks on the way."""
        placed: list[tuple[_Chunk, int]] = []
        made: list[_Chunk] = []
        for chunk in self.of("data"):
            if size <= 0:
                break
            if chunk.start + chunk.length <= below and chunk.free > 0:
                part = min(chunk.free, size)
                placed.append((chunk, part))
                size -= part
        while size > 0:
            hole = self.hole(self.data_chunk, below)
            if hole is None or sum(c.length for c in self.chunks) >= below:
                for chunk in made:
                    self.chunks.remove(chunk)
                return None
            chunk = _Chunk(hole[0], hole[1], "data")
            self.chunks.append(chunk)
            made.append(chunk)
            part = min(chunk.length, size)
            placed.append((chunk, part))
            size -= part
        return placed

    def write(self, size: int) -> int:
        """An application writes up to `size` bytes; bytes written, fewer when the filesystem is full."""
        with self.lock:
            size = min(sector_floor(size), sector_floor(self.data_free()) + self.unallocated())
            while size > 0:
                placed = self.place(size, self.size)
                if placed is not None:
                    for chunk, part in placed:
                        chunk.used += part
                    return size
                size = sector_floor(size // 2)
            return 0

    def delete(self, size: int) -> int:
        """An application deletes up to `size` bytes, newest chunks first; bytes freed."""
        with self.lock:
            freed = 0
            for chunk in reversed(self.of("data")):
                part = min(chunk.used, size - freed)
                chunk.used -= part
                freed += part
            self.freed += freed
            return freed

    def set_device(self, device: int) -> None:
        """The host resizes the image."""
        with self.lock:
            self.device = device


class SimFilesystem:
    """`core.ports.Filesystem` on a SimDisk."""

    mountpoint = "/sim"
    uuid = "00000000-0000-0000-0000-000000000000"

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk

    def space(self) -> Space:
        disk = self.disk
        disk.faults.meet("space")
        with disk.lock:
            data, metadata = disk.of("data"), disk.of("metadata")
            return Space(
                size=disk.size,
                device=disk.device,
                data_total=sum(c.length for c in data),
                data_used=sum(c.used + c.held for c in data),
                metadata_total=sum(c.length for c in metadata),
                metadata_used=sum(c.used for c in metadata),
                global_reserve=5 * MIB,
                unallocated=disk.unallocated(),
                data_chunk=disk.data_chunk,
                metadata_chunk=min(256 * MIB, disk.size // 10),
                read_only=disk.read_only,
                exclusive_operation=disk.exclusive_operation,
            )

    def metadata_headroom(self) -> int:
        with self.disk.lock:
            return sum(c.length - c.used for c in self.disk.of("metadata")) - 5 * MIB

    def layout(self) -> Layout:
        with self.disk.lock:
            return Layout(
                self.disk.size,
                self.disk.device,
                tuple(
                    Chunk(
                        *(c.start, c.length, c.used + c.held, 0, c.kind, (c.start,), c.length),
                        (c.free,) if c.kind == "data" and c.free > 0 else (),
                    )
                    for c in sorted(self.disk.chunks, key=lambda c: c.start)
                ),
                5 * MIB,
            )

    def data_extents(self, start: int, length: int) -> list[tuple[int, int]]:
        with self.disk.lock:
            chunk = next((c for c in self.disk.chunks if c.start == start and c.length <= length), None)
            return [(start, SECTOR)] if chunk is not None and chunk.used else []

    def size(self) -> int:
        return self.disk.size

    def device_size(self) -> int:
        return self.disk.device

    def statvfs_available(self) -> int | None:
        if self.disk.exclusive_operation == "resize":
            return None
        return self.space().available

    def sync(self) -> None:
        self.disk.faults.meet("sync")
        with self.disk.lock:
            self.disk.untrimmed += self.disk.freed
            self.disk.freed = 0

    def discard_supported(self) -> bool:
        return True

    def untrimmed(self) -> int | None:
        return self.disk.untrimmed

    def trim(self) -> int:
        self.disk.faults.meet("trim")
        with self.disk.lock:
            self.disk.untrimmed = 0
            return self.disk.data_free() + self.disk.unallocated()

    def reclaim_empty_chunks(self) -> None:
        disk = self.disk
        disk.faults.meet("reclaim_empty_chunks")
        with disk.lock:
            self._exclusive("balance")
            disk.chunks = [c for c in disk.chunks if c.kind != "data" or c.used or c.held]

    def grow_metadata(self) -> None:
        disk = self.disk
        disk.faults.meet("grow_metadata")
        with disk.lock:
            self._exclusive("balance")
            for chunk in disk.of("metadata"):
                hole = disk.hole(self.space().metadata_chunk, disk.size)
                if hole is None or hole[1] <= chunk.length:
                    return  # the kernel would make one no larger
                disk.chunks.remove(chunk)
                disk.chunks.append(_Chunk(*hole, "metadata", used=chunk.used))

    def _exclusive(self, what: str) -> None:
        if self.disk.exclusive_operation != "none":
            raise FilesystemError(f"{what}: {self.disk.exclusive_operation} is running", errno.EBUSY, Kind.BUSY)


class SimBalloonFile:
    """`core.ports.BalloonFile` on a SimDisk; what it holds is on the disk, so it survives its owner."""

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk

    def size(self) -> int:
        with self.disk.lock:
            return sum(c.held for c in self.disk.chunks)

    def extend(self, size: int) -> None:
        disk = self.disk
        disk.faults.meet("extend")
        with disk.lock:
            if disk.read_only:
                raise FilesystemError("read-only", errno.EROFS, Kind.PRECONDITION)
            placed = disk.place(sector_floor(size), disk.size)
            if placed is None:
                raise FilesystemError(f"no room for {size} bytes", errno.ENOSPC)
            for chunk, part in placed:
                chunk.held += part

    def shrink(self, size: int) -> None:
        self.disk.faults.meet("shrink")
        with self.disk.lock:
            for chunk in reversed(self.disk.of("data")):
                cut = min(chunk.held, size)
                chunk.held -= cut
                size -= cut

    def extents(self) -> list[tuple[int, int]]:
        with self.disk.lock:
            return [(c.start + c.length - c.held, c.held) for c in self.disk.chunks if c.held]

    def vacate(self, ranges: list[tuple[int, int]]) -> int:
        given = 0
        with self.disk.lock:
            for chunk in self.disk.chunks:
                end = chunk.start + chunk.length
                if any(start < end and end - chunk.held < start + span for start, span in ranges):
                    given += chunk.held
                    chunk.held = 0
        return given

    def remove(self) -> None:
        self.disk.faults.meet("remove")
        with self.disk.lock:
            for chunk in self.disk.chunks:
                chunk.held = 0


class SimResizer:
    """`core.ports.Resizer` on a SimDisk. A shrink moves chunk by chunk, at the disk's speed."""

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk

    def resize(self, size: int) -> None:
        disk = self.disk
        disk.faults.meet("resize")
        size = sector_floor(size)
        with disk.lock:
            if disk.exclusive_operation != "none":
                raise FilesystemError(disk.exclusive_operation, errno.EINPROGRESS, Kind.BUSY)
            if disk.read_only:
                raise FilesystemError("read-only", errno.EROFS, Kind.PRECONDITION)
            if size < KERNEL_MINIMUM:
                raise FilesystemError(f"resize to {size} bytes: invalid", errno.EINVAL)
            if size > disk.device:
                raise FilesystemError(f"resize to {size} bytes: the device is smaller than that", errno.EFBIG)
            disk.exclusive_operation = "resize"
            disk.cancelled.clear()
        try:
            if size < disk.size:
                self._evacuate(size)
            with disk.lock:
                disk.size = size
        finally:
            disk.exclusive_operation = "none"

    def _evacuate(self, size: int) -> None:
        disk = self.disk
        for chunk in sorted(disk.chunks, key=lambda c: c.start, reverse=True):
            if chunk.start + chunk.length <= size:
                break
            self._spend(chunk.used + chunk.held)
            with disk.lock:
                if chunk.kind == "data":
                    if not any(c.used or c.held for c in disk.of("data")):
                        self._another(size)
                    placed = disk.place(chunk.used, size) if chunk.used else []
                    # A relocated balloon is real writes: nothing of it may be left above.
                    held = disk.place(chunk.held, size) if placed is not None and chunk.held else []
                else:
                    if self._move_metadata(chunk, size):
                        continue
                    disk.read_only = True  # as the kernel does: nobody may try it without being certain
                    placed, held = None, None
                if placed is None or held is None:
                    raise FilesystemError(f"resize to {size} bytes: no room", errno.ENOSPC)
                for target, part in placed:
                    target.used += part
                for target, part in held:
                    target.held += part
                disk.chunks.remove(chunk)

    def _move_metadata(self, chunk: _Chunk, below: int) -> bool:
        """A new chunk for `chunk` below an address, a tenth of that long; False when no hole takes what is in it."""
        tenth = -(-below // 10 // METADATA_STEP) * METADATA_STEP
        length = min(chunk.length if chunk.kind == "system" else 256 * MIB, tenth)
        hole = self.disk.roomiest(length, below)
        if hole is None or hole[1] < chunk.used or sum(c.length for c in self.disk.chunks) >= below:
            return False
        chunk.start, chunk.length = hole
        return True

    def move_out(self, logical: int, *, metadata: bool = False) -> None:
        disk = self.disk
        disk.faults.meet("move_out")
        with disk.lock:
            if disk.exclusive_operation != "none":
                raise FilesystemError(disk.exclusive_operation, errno.EINPROGRESS, Kind.BUSY)
            chunk = next((c for c in disk.of("metadata" if metadata else "data") if c.start == logical), None)
            if chunk is None:
                return
            disk.exclusive_operation = "balance"
            disk.cancelled.clear()
        try:
            self._spend(chunk.used + chunk.held)
            with disk.lock:
                if metadata:
                    if not self._move_metadata(chunk, disk.size):
                        disk.read_only = True  # as the kernel does: nobody may try it without being certain
                    return
                used, chunk.used = chunk.used, chunk.length - chunk.held  # nothing goes into what is being moved
                placed = disk.place(used + chunk.held, disk.size)
                if placed is None:
                    chunk.used = used
                    raise FilesystemError(f"moving the data chunk at {logical}: no room", errno.ENOSPC)
                disk.chunks.remove(chunk)
                for target, part in placed:
                    target.used += min(part, used)
                    target.held += part - min(part, used)
                    used -= min(part, used)
        finally:
            disk.exclusive_operation = "none"

    def _another(self, size: int) -> None:
        """What the kernel does before it cuts a data chunk away while none holds anything: it makes a new one."""
        placed = self.disk.place(self.disk.data_free() + SECTOR, size)
        if placed is None:
            raise FilesystemError(f"resize to {size} bytes: no room", errno.ENOSPC)

    def _spend(self, size: int) -> None:
        disk = self.disk
        if disk.speed is not None and disk.cancelled.wait(size / disk.speed):
            raise FilesystemError("cancelled", errno.ECANCELED)
        if disk.cancelled.is_set():
            raise FilesystemError("cancelled", errno.ECANCELED)
        disk.written += size
        time.sleep(0)

    def cancel(self) -> None:
        self.disk.cancelled.set()

    def written(self) -> int:
        return self.disk.written

    def close(self) -> None:
        self.disk.cancelled.set()
