"""A btrfs in memory: chunks of a tenth of the filesystem, a balloon that takes data room, a resize that moves.

It keeps to what the real one was measured to do: first fit in data chunks, then a new chunk in the lowest hole;
all-or-nothing preallocation; emptied chunks stay allocated until they are reclaimed; a shrink must find room below
the new end for everything above it, makes new chunks only while all chunks together are smaller than the new size,
and keeps one data chunk while no data is used. Logical addresses are device offsets (single profile).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from storaged.core.model import KernelReclaim
from storaged.sim.faults import Faults
from storaged.units import GIB, MIB, SECTOR, sector_floor


@dataclass(slots=True)
class SimChunk:
    """A chunk and what is in it; sizes in bytes."""

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
        self.untrimmable = 0  # of it, what no trim may hold back now
        self.written = 0
        self.device_written = 0
        self.kernel_reclaim = KernelReclaim()
        self.unwritten = 0  # preallocated by applications; part of what their chunks hold
        self.speed: float | None = None  # bytes a second that a shrink moves; None is at once
        self.cancelled = threading.Event()
        self.chunks: list[SimChunk] = [
            SimChunk(MIB, 8 * MIB, "system"),
            SimChunk(9 * MIB, min(size // 10 // 65536 * 65536, 256 * MIB), "metadata", used=128 * 1024),
        ]

    @property
    def data_chunk(self) -> int:
        """The length of a new data chunk."""
        return min(GIB, self.size // 10 // 65536 * 65536)

    def of(self, kind: str) -> list[SimChunk]:
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

    def place(self, size: int, below: int) -> list[tuple[SimChunk, int]] | None:
        """Where `size` bytes of data go, below an address; None when they do not fit. Makes chunks on the way."""
        placed: list[tuple[SimChunk, int]] = []
        made: list[SimChunk] = []
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
            chunk = SimChunk(hole[0], hole[1], "data")
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
                    self.device_written += size
                    return size
                size = sector_floor(size // 2)
            return 0

    def preallocate(self, size: int) -> int:
        """An application preallocates up to `size` bytes; bytes preallocated."""
        with self.lock:
            size = self.write(size)
            self.device_written -= size
            self.unwritten += size
            return size

    def write_preallocated(self, size: int) -> int:
        """An application writes up to `size` bytes of what it preallocated; bytes written."""
        with self.lock:
            size = min(size, self.unwritten)
            self.unwritten -= size
            self.device_written += size
            return size

    def delete(self, size: int) -> int:
        """An application deletes up to `size` bytes, newest chunks first; bytes freed."""
        with self.lock:
            freed = 0
            for chunk in reversed(self.of("data")):
                part = min(chunk.used, size - freed)
                chunk.used -= part
                freed += part
            self.freed += freed
            self.unwritten = min(self.unwritten, sum(c.used for c in self.of("data")))
            return freed

    def set_device(self, device: int) -> None:
        """The host resizes the image."""
        with self.lock:
            self.device = device
