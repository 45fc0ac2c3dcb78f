"""Looking at a pool: what is free, and what each guest's image takes of it. Blocks; belongs into a thread.

One look costs microseconds per image: statvfs and stat read what the kernel has in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from storaged.errors import Kind, StoragedError
from storaged.host import devicemapper, identity
from storaged.host.events import PoolSampled

BLOCK = 512
"""The unit of st_blocks (stat(2)) and of device-mapper's sectors, whatever the filesystem's block size."""
METADATA_KEPT = 4096
"""Blocks of 4 KiB at most, and a tenth at most, of a thin pool's metadata are not for mappings."""
MAPPED_BY_A_BLOCK = 64
"""Data blocks that a block of metadata surely maps: half of the fewest that a B-tree's leaf of 252 entries holds."""


class PoolError(StoragedError):
    """The pool cannot be read: nothing is known, and nothing may be concluded."""

    kind = Kind.UNAVAILABLE


class Source(Protocol):
    """Where a pool's free bytes come from."""

    def free(self) -> int:
        """Bytes that can still be written. Raises PoolError."""
        ...

    def total(self) -> int:
        """Bytes that the pool has in all. Raises PoolError."""
        ...


@dataclass(frozen=True, slots=True)
class FilesystemSource:
    """The filesystem mounted at `path`, as an unprivileged writer sees it."""

    path: str

    def free(self) -> int:
        try:
            stats = os.statvfs(self.path)
        except OSError as error:
            raise PoolError(f"pool {self.path}: {error.strerror}") from error
        return stats.f_bavail * stats.f_frsize

    def total(self) -> int:
        try:
            return capacity(self.path)
        except OSError as error:
            raise PoolError(f"pool {self.path}: {error.strerror}") from error


def capacity(path: str) -> int:
    """Bytes of the filesystem mounted at `path`. Raises OSError."""
    stats = os.statvfs(path)
    return stats.f_blocks * stats.f_frsize


def thin_pool_free(status: str, block: int) -> int:
    """Bytes that a thin pool of `block` bytes a block still takes, from its `dmsetup status`. Raises PoolError.

    status: START LENGTH thin-pool TRANSACTION METADATA_USED/TOTAL DATA_USED/TOTAL ...  (kernel:
    device-mapper/thin-provisioning). It ends when either data or metadata does; the kernel keeps some of the metadata
    for itself (drivers/md/dm-thin-metadata.c, __set_metadata_reserve). One in need of repair, or read-only, takes none.
    """
    fields = status.split()
    if len(fields) < 4 or fields[2] != "thin-pool":
        raise PoolError(f"not a thin pool: {status.strip()!r}")
    if fields[3] in {"Fail", "Error"} or {"ro", "out_of_data_space", "needs_check"} & set(fields[6:]):
        return 0
    try:
        (mapped, most_mapped), (used, total) = (map(int, field.split("/")) for field in fields[4:6])
    except ValueError as error:
        raise PoolError(f"thin pool status {status.strip()!r} is not understood") from error
    kept = min(METADATA_KEPT, most_mapped // 10)
    return max(min(total - used, (most_mapped - mapped - kept) * MAPPED_BY_A_BLOCK), 0) * block


def thin_pool_total(status: str, block: int) -> int:
    """Bytes of data that a thin pool of `block` bytes a block has, from its `dmsetup status`. Raises PoolError."""
    fields = status.split()
    try:
        return int(fields[5].split("/")[1]) * block
    except (IndexError, ValueError) as error:
        raise PoolError(f"thin pool status {status.strip()!r} is not understood") from error


def thin_pool_block(table: str) -> int:
    """Bytes of a thin pool's block, from its `dmsetup table`. Raises PoolError.

    table:  START LENGTH thin-pool METADATA_DEV DATA_DEV BLOCK_SECTORS ...
    """
    shape = table.split()
    if shape[2:3] != ["thin-pool"]:
        raise PoolError(f"not a thin pool: {table.strip()!r}")
    try:
        return int(shape[5]) * BLOCK
    except (IndexError, ValueError) as error:
        raise PoolError(f"thin pool table {table.strip()!r} is not understood") from error


@dataclass(frozen=True, slots=True)
class BtrfsSource:
    """A btrfs whose counts are in `allocation` (sysfs): statvfs tells nothing of what is written and not yet placed."""

    filesystem: FilesystemSource
    allocation: str

    def free(self) -> int:
        """Bytes that can still be written. Raises PoolError.

        Data that waits to be written back counts in the images' st_blocks already (btrfs_getattr, fs/btrfs/inode.c),
        and in statvfs only once it has a place (btrfs_statfs, fs/btrfs/super.c).
        """
        try:
            promised = sum(self._number(name) for name in ("bytes_may_use", "bytes_reserved", "bytes_pinned"))
        except (OSError, ValueError) as error:
            raise PoolError(f"pool {self.filesystem.path}: {error}") from error
        return max(self.filesystem.free() - promised, 0)

    def total(self) -> int:
        """Bytes that the pool has in all. Raises PoolError."""
        return self.filesystem.total()

    def _number(self, name: str) -> int:
        with open(f"{self.allocation}/data/{name}", encoding="ascii") as file:
            return int(file.read())


def filesystem_source(path: str) -> Source:
    """The free bytes of the filesystem mounted at `path`, as that kind of filesystem tells them."""
    source = FilesystemSource(path)
    uuid = identity.btrfs(path).hex()
    if not uuid:
        return source
    name = "-".join((uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:]))
    allocation = f"/sys/fs/btrfs/{name}/allocation"
    return BtrfsSource(source, allocation) if os.path.exists(f"{allocation}/data/bytes_may_use") else source


class ThinSource:
    """A filesystem on a thin volume: what is free is the least of what it and the dm-thin pool `pool` have."""

    def __init__(self, filesystem: Source, pool: str) -> None:
        self.filesystem = filesystem
        self.pool = pool
        self._block = 0  # as long as there is a pool by this name it stays what it is

    def free(self) -> int:
        status = self._status()
        return min(self.filesystem.free(), thin_pool_free(status, self._block))

    def total(self) -> int:
        """Bytes of data that the pool has in all. Raises PoolError."""
        return thin_pool_total(self._status(), self._block)

    def _status(self) -> str:
        try:
            self._block = self._block or thin_pool_block(devicemapper.table(self.pool))
            return devicemapper.status(self.pool)
        except devicemapper.DeviceMapperError as error:
            self._block = 0  # what comes by this name may be another
            raise PoolError(error.message) from error


def allocated(image: str) -> int | None:
    """Bytes that the file really takes; None when it cannot be read."""
    try:
        return os.stat(image).st_blocks * BLOCK
    except OSError:
        return None


def _stat(image: str) -> os.stat_result | None:
    try:
        return os.stat(image)
    except OSError:
        return None


def logical(image: str) -> int:
    """Bytes that the file would take with no hole in it; 0 when it cannot be read."""
    try:
        return os.stat(image).st_size
    except OSError:
        return 0


class Watcher:
    """Takes epochs of one pool."""

    def __init__(self, source: Source, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock

    def glance(self) -> int:
        """What is free, alone. Raises PoolError."""
        return self._source.free()

    def total(self) -> int:
        """Bytes of the pool. Raises PoolError."""
        return self._source.total()

    def take(self, images: Mapping[str, str]) -> PoolSampled:
        """One bracket of reads; an image that cannot be read is left out. Raises PoolError."""
        at = self._clock()
        before = self._source.free()
        seen = {name: status for name, path in images.items() if (status := _stat(path)) is not None}
        taken = {name: status.st_blocks * BLOCK for name, status in seen.items()}
        sizes = {name: status.st_size for name, status in seen.items()}
        # A guest may write between the two: the smaller number cannot promise what is spent.
        return PoolSampled(min(before, self._source.free()), at, taken, self._source.total(), sizes)
