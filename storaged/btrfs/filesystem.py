"""The real filesystem behind `core.ports.Filesystem`: sysfs for space, ioctls for the rest."""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import btrfs
from btrfs.ctree import BLOCK_GROUP_DATA, BLOCK_GROUP_METADATA, BLOCK_GROUP_SYSTEM

from storaged.btrfs import ioctl, search
from storaged.btrfs.swap import pinned_ranges
from storaged.core.model import MOST_SUPERBLOCKS, KernelReclaim, Space
from storaged.core.trim import ChunkRange, is_safe, pieces
from storaged.errors import FilesystemError, Kind, NotBtrfs, Unsupported
from storaged.resize.layout import Chunk, Layout
from storaged.units import GIB, MIB

MOST_DATA_CHUNK = GIB
"""A data stripe is at most this (fs/btrfs/volumes.c, init_alloc_chunk_ctl_policy_regular)."""
READS = 5
"""Tries to read what is used without anything moving on meanwhile."""
CHUNK_STEP = 16 * MIB
"""A tenth of the filesystem is rounded up to this (fs/btrfs/volumes.c, decide_stripe_size_regular)."""
DEVICE_RANGE_RESERVED = MIB
"""BTRFS_DEVICE_RANGE_RESERVED: never part of a chunk."""


_RECLAIM = ("bg_reclaim_threshold", "dynamic_reclaim", "periodic_reclaim")


@contextmanager
def kernel(what: str) -> Iterator[None]:
    """Turns an OSError into the FilesystemError that names what was tried."""
    try:
        yield
    except OSError as error:
        kind = {
            errno.EPERM: Kind.UNSUPPORTED,
            errno.EOPNOTSUPP: Kind.UNSUPPORTED,
            errno.EROFS: Kind.PRECONDITION,
        }
        number = error.errno or 0
        raise FilesystemError(f"{what}: {os.strerror(number)}", number, kind.get(number)) from error


def _check_btrfs(path: str) -> None:
    """Raise OSError unless there is a btrfs: the library would leave the file open that it finds this out with."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        btrfs.ioctl.fs_info(fd)
    finally:
        os.close(fd)


class BtrfsFilesystem:
    """A mounted btrfs on one device. Raises Unsupported when it is something else."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = os.path.realpath(mountpoint)
        try:
            _check_btrfs(self._mountpoint)
            self._fs = btrfs.FileSystem(self._mountpoint)
        except OSError as error:
            raise NotBtrfs(f"{mountpoint} is not a mounted btrfs filesystem: {error.strerror}") from error
        self._files: dict[str, int] = {}
        try:
            self._identify(mountpoint)
        except BaseException:
            self.close()  # whoever waits for a filesystem comes here again and again
            raise

    def _identify(self, mountpoint: str) -> None:
        info = self._fs.fs_info()
        self.fd: int = self._fs.fd
        self._uuid = str(info.fsid)
        if info.num_devices != 1:
            raise Unsupported(f"{mountpoint} spans {info.num_devices} devices; storaged manages one-device filesystems")
        self.devid: int = info.max_id
        self.device_path: str = self._fs.dev_info(self.devid).path
        number = os.stat(self.device_path).st_rdev
        self.device_name = f"{os.major(number)}:{os.minor(number)}"
        self._block = f"/sys/dev/block/{self.device_name}"
        self._sysfs = f"/sys/fs/btrfs/{self._uuid}"
        self._mixed = os.path.isdir(f"{self._sysfs}/allocation/mixed")
        self._data = f"allocation/{'mixed' if self._mixed else 'data'}"
        self._metadata = f"allocation/{'mixed' if self._mixed else 'metadata'}"

    def close(self) -> None:
        """Let go of every file; the filesystem can be unmounted afterwards."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._fs.__exit__(None, None, None)

    @property
    def mountpoint(self) -> str:
        return self._mountpoint

    @property
    def uuid(self) -> str:
        return self._uuid

    def _text(self, name: str) -> str:
        fd = self._files.get(name)
        if fd is None:
            fd = self._files[name] = os.open(f"{self._sysfs}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(fd, 64, 0).decode().strip()

    def _number(self, name: str) -> int:
        return int(self._text(name))

    def space(self) -> Space:
        with kernel("reading the filesystem's space"):
            before = self._allocated()
            for _ in range(READS):
                found, last = self._space(), before
                before = self._allocated()
                if before == last:
                    return found
            return self._space()  # a chunk that is new between two reads is counted twice, or not at all

    def _allocated(self) -> tuple[int, int]:
        """Bytes of all chunks, and of those for data."""
        return self._fs.dev_info(self.devid).bytes_used, self._number(f"{self._data}/total_bytes")

    def _space(self) -> Space:
        device = self._fs.dev_info(self.devid)
        data, metadata = self._data, self._metadata
        used = self._used(data)
        data_total = self._number(f"{data}/total_bytes")
        metadata_total = self._number(f"{metadata}/total_bytes")
        size: int = device.total_bytes
        tenth = -(-(size // 10) // CHUNK_STEP) * CHUNK_STEP
        return Space(
            size=size,
            device=self.device_size(),
            data_total=data_total,
            data_used=used,
            data_pinned=self._number(f"{data}/bytes_pinned"),
            data_readonly=max(self._number(f"{data}/bytes_readonly") - MOST_SUPERBLOCKS, 0),
            metadata_total=metadata_total,
            metadata_readonly=self._number(f"{metadata}/bytes_readonly"),
            metadata_used=self._metadata_used(metadata),
            global_reserve=self._number("allocation/global_rsv_size"),
            unallocated=max(size - device.bytes_used - DEVICE_RANGE_RESERVED, 0),
            data_chunk=min(MOST_DATA_CHUNK, tenth, self._chunk_size(data)),
            metadata_chunk=min(tenth, self._chunk_size(metadata)),
            data_copies=self._copies(data, data_total),
            metadata_copies=self._copies(metadata, metadata_total),
            mixed=self._mixed,
            read_only=self.read_only(),
            exclusive_operation=self._text("exclusive_operation"),
        )

    def _used(self, kind: str) -> int:
        """Bytes of `kind` that are taken, however far they are on their way to the disk.

        They go from `may_use` to `reserved` to `used`, and each is a file of its own: what moves on between two reads
        would be missing. So it is read again until `used` stood still meanwhile; at last it is rather told too little.
        """
        before = rest = 0
        used = self._number(f"{kind}/bytes_used")
        for _ in range(READS):
            rest = self._number(f"{kind}/bytes_reserved") + self._number(f"{kind}/bytes_may_use")
            before, used = used, self._number(f"{kind}/bytes_used")
            if used == before:
                break
        return before + rest

    def metadata_headroom(self) -> int:
        metadata = self._metadata
        with kernel("reading the filesystem's space"):
            used = self._metadata_used(metadata) + self._number("allocation/global_rsv_size")
            return self._number(f"{metadata}/total_bytes") - used

    def _metadata_used(self, metadata: str) -> int:
        parts = ("bytes_used", "bytes_reserved", "bytes_pinned", "bytes_readonly")
        return sum(self._number(f"{metadata}/{part}") for part in parts)

    def _chunk_size(self, kind: str) -> int:
        try:
            return self._number(f"{kind}/chunk_size")  # since Linux 6.0
        except FileNotFoundError:
            return MOST_DATA_CHUNK if kind.endswith("data") and not kind.endswith("metadata") else GIB // 4

    def _copies(self, kind: str, total: int) -> int:
        return max(self._number(f"{kind}/disk_total") // total, 1) if total else 1

    def read_only(self) -> bool:
        """True also after the kernel forced it."""
        return bool(os.statvfs(self.fd).f_flag & os.ST_RDONLY)

    def layout(self) -> Layout:
        with kernel("reading the chunk layout"):
            used = {group.vaddr: group.used for group in self._fs.block_groups()}
            device = self._fs.dev_info(self.devid)
            rooms = self._rooms(used)
            pinned = pinned_ranges(self._uuid)
            chunks = tuple(
                Chunk(
                    logical=chunk.vaddr,
                    length=chunk.length,
                    used=used.get(chunk.vaddr, 0),
                    balloon=0,
                    kind=_kind(chunk.type),
                    stripes=tuple(stripe.offset for stripe in chunk.stripes),
                    stripe_length=chunk.length,  # single and DUP: a stripe is as long as the chunk
                    rooms=tuple(rooms.get(chunk.vaddr, ())) if chunk.type & BLOCK_GROUP_DATA else (),
                    # FIEMAP joins extents that follow each other, also across chunks.
                    pinned=any(start < chunk.vaddr + chunk.length and chunk.vaddr < start + n for start, n in pinned),
                )
                for chunk in self._fs.chunks()
            )
            return Layout(
                device.total_bytes,
                self.device_size(),
                chunks,
                self._number("allocation/global_rsv_size"),
                self._chunk_size(self._metadata),
            )

    def _rooms(self, starts: Iterable[int]) -> dict[int, list[int]]:
        """Lengths of the pieces of free room by the chunk they lie in; none without a free space tree."""
        ordered = sorted(starts)
        rooms: dict[int, list[int]] = {start: [] for start in ordered}
        for start, length in search.free_extents(self.fd):
            index = bisect.bisect_right(ordered, start) - 1
            if index >= 0:
                rooms[ordered[index]].append(length)
        return rooms

    def data_extents(self, start: int, length: int) -> list[tuple[int, int]]:
        with kernel("reading the extents of a chunk"):
            return list(search.data_extents(self.fd, start, length))

    def size(self) -> int:
        size: int = self._fs.dev_info(self.devid).total_bytes
        return size

    def device_size(self) -> int:
        with open(f"{self._block}/size", encoding="ascii") as file:
            return int(file.read()) * 512

    def statvfs_available(self) -> int | None:
        with kernel("statvfs"):
            answer = os.statvfs(self.fd)
        # During a shrink the kernel's subtraction wraps round to about 2^64.
        return answer.f_bavail * answer.f_frsize if answer.f_bavail <= answer.f_blocks else None

    def sync(self) -> None:
        with kernel("committing the filesystem"):
            ioctl.sync(self.fd)

    def discard_supported(self) -> bool:
        for queue in (f"{self._block}/queue", f"{self._block}/../queue"):  # a partition has its disk's queue
            try:
                with open(f"{queue}/discard_max_bytes", encoding="ascii") as file:
                    return int(file.read()) > 0
            except FileNotFoundError:
                continue
        return False

    def untrimmed(self) -> int | None:
        try:
            return self._number("discard/discardable_bytes")
        except OSError:
            return None

    def kernel_reclaim(self) -> KernelReclaim:
        return KernelReclaim(*(self._setting(name) for name in _RECLAIM))

    def _setting(self, name: str) -> int:
        try:
            return self._number(f"allocation/data/{name}")
        except OSError:
            return 0  # mixed block groups, or an older kernel

    def set_kernel_reclaim(self, settings: KernelReclaim) -> None:
        for name, value in zip(_RECLAIM, (settings.threshold, settings.dynamic, settings.periodic), strict=True):
            if value != self._setting(name):
                with kernel(f"setting {name}"), open(f"{self._sysfs}/allocation/data/{name}", "wb", 0) as file:
                    file.write(b"%d" % value)

    def device_written(self) -> int:
        with kernel("reading the device's statistics"), open(f"{self._block}/stat", encoding="ascii") as file:
            return int(file.read().split()[6]) * 512  # write sectors (Documentation/block/stat.rst)

    def trim(self, exclusive: AbstractContextManager[object] | None = None) -> int:
        exclusive = exclusive if exclusive is not None else nullcontext()
        with kernel("discarding free space (FITRIM)"):
            trimmed = ioctl.trim(self.fd, 0, DEVICE_RANGE_RESERVED)  # no chunk begins there: what is unallocated
            for piece in pieces(self._free_extents()):
                with exclusive:
                    if is_safe(piece, self._space()):
                        trimmed += ioctl.trim(self.fd, piece.chunk.start, piece.chunk.length)
            return trimmed

    def _free_extents(self) -> Iterator[tuple[ChunkRange, int, int]]:
        """In ascending order, as of the last commit; without a free space tree a whole chunk counts as one."""
        groups = sorted(self._fs.block_groups(), key=lambda group: group.vaddr)
        ranges = [ChunkRange(group.vaddr, group.length, _kind(group.flags)) for group in groups]
        starts = [chunk.start for chunk in ranges]
        none = True
        for start, length in search.free_extents(self.fd):
            none = False
            index = bisect.bisect_right(starts, start) - 1
            if index >= 0:
                yield ranges[index], start, length
        if none:
            yield from ((chunk, chunk.start, chunk.length) for chunk in ranges)

    def reclaim_empty_chunks(self) -> None:
        with kernel("handing empty chunks back (balance)"):
            # Extents allocated since the last commit do not count as used yet: their chunk would be taken for empty,
            # and relocating a preallocated extent writes it.
            ioctl.sync(self.fd)
            self._balance(data_args=btrfs.ioctl.BalanceArgs(usage_max=0))

    def grow_metadata(self) -> None:
        with kernel("growing the metadata chunks (balance)"):
            self._balance(meta_args=btrfs.ioctl.BalanceArgs())

    def _balance(self, **arguments: object) -> None:
        if self._text("exclusive_operation") != "none":
            raise OSError(errno.EBUSY, "an exclusive operation is running")
        try:
            btrfs.ioctl.balance_v2(self.fd, **arguments)
        except btrfs.ioctl.BalanceError as error:
            raise OSError(error.errno or errno.EIO, str(error)) from error


def _kind(flags: int) -> str:
    if flags & BLOCK_GROUP_DATA and flags & BLOCK_GROUP_METADATA:
        return "mixed"
    if flags & BLOCK_GROUP_DATA:
        return "data"
    if flags & BLOCK_GROUP_METADATA:
        return "metadata"
    return "system" if flags & BLOCK_GROUP_SYSTEM else "other"
