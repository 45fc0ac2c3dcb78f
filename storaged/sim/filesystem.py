"""The filesystem and the balloon file on a disk in memory."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager, nullcontext

from storaged.core.model import KernelReclaim, Space
from storaged.errors import FilesystemError, Kind
from storaged.resize.layout import Chunk, Layout
from storaged.sim.disk import SimChunk, SimDisk
from storaged.units import MIB, SECTOR, sector_floor


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
        self.disk.faults.meet("device_size")
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

    def kernel_reclaim(self) -> KernelReclaim:
        return self.disk.kernel_reclaim

    def set_kernel_reclaim(self, settings: KernelReclaim) -> None:
        self.disk.faults.meet("set_kernel_reclaim")
        self.disk.kernel_reclaim = settings

    def device_written(self) -> int:
        return self.disk.device_written

    def trim(self, exclusive: AbstractContextManager[object] | None = None) -> int:
        self.disk.faults.meet("trim")
        with exclusive if exclusive is not None else nullcontext(), self.disk.lock:
            self.disk.untrimmed = min(self.disk.untrimmed, self.disk.untrimmable)
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
                disk.chunks.append(SimChunk(*hole, "metadata", used=chunk.used))

    def _exclusive(self, what: str) -> None:
        if self.disk.exclusive_operation != "none":
            raise FilesystemError(f"{what}: {self.disk.exclusive_operation} is running", errno.EBUSY, Kind.BUSY)


class SimBalloonFile:
    """`core.ports.BalloonFile` on a SimDisk; what it holds is on the disk, so it survives its owner."""

    root_id = 0

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk
        self.found: list[tuple[str, bool]] = []

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
