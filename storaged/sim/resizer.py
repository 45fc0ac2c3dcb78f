"""The kernel's resize and balance on a disk in memory."""

from __future__ import annotations

import errno
import time

from storaged.errors import FilesystemError, Kind
from storaged.resize.layout import KERNEL_MINIMUM
from storaged.sim.disk import SimChunk, SimDisk
from storaged.units import MIB, SECTOR, sector_floor

METADATA_STEP = 16 * MIB


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

    def _move_metadata(self, chunk: SimChunk, below: int) -> bool:
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
