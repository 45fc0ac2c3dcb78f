"""The process that finds preallocated, unwritten extents in every subvolume, for `btrfs.prealloc`.

It is started as a plain script, imports only the standard library, and dies with the daemon: a thread sees the end of
standard input, also while a scan runs.

Request: `look B`, where B is the id of the balloon's subvolume, or 0. Answer: `KNOWN BYTES FILES SCANNED`, or
`error ERRNO TEXT`. KNOWN is 0 until every subvolume has been read once.

How it stays correct without reading everything at every look:

- BTRFS_IOC_TREE_SEARCH_V2 reads the live tree, and skips nodes older than `min_transid`. Changes after the start of a
  look lie in nodes of the generation that FS_INFO showed then, or of a later one. The next look starts there.
- An inode with a PREALLOC item in a changed leaf is read again as a whole, and so is an inode that had one before. A
  deleted inode may leave no trace, so those of a changed subvolume are looked up, up to `PROBES` a look.
- A new snapshot shares old leaves with its source. It starts as the copy of what the last look found in the source,
  and is then looked at like the source itself: what has changed since lies in new leaves, in the snapshot as well.
- Relocation puts leaves into a tree that are older than the change. A subvolume that has a relocation tree keeps the
  generation from before, until that tree is gone.
- The balloon is read as a whole, and last: an extent that it gave back must not hide an application's.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import os
import queue
import signal
import struct
import sys
import threading
from collections.abc import Iterable
from typing import NamedTuple

IOC_TREE_SEARCH_V2 = 0xC0709411  # _IOWR(0x94, 17, struct btrfs_ioctl_search_args_v2)
IOC_FS_INFO = 0x8400941F  # _IOR(0x94, 31, struct btrfs_ioctl_fs_info_args)
FS_INFO_SIZE = 1024
FS_INFO = struct.Struct("=48xQQ")
"""btrfs_ioctl_fs_info_args: flags and generation (Linux 5.10)."""
FS_INFO_FLAG_GENERATION = 1 << 1
KEY = struct.Struct("=7Q4L4Q")
"""btrfs_ioctl_search_key; the size of the buffer follows it."""
HEADER = struct.Struct("=QQQLL")
"""btrfs_ioctl_search_header: transid, objectid, offset, type, length."""
OBJECT_TYPE_LENGTH = struct.Struct("=8xQ8xLL")
FILE_EXTENT = struct.Struct("=21xQQQQ")
"""btrfs_file_extent_item: disk_bytenr, disk_num_bytes, offset, num_bytes; bytes 16 and 20 are compression and type."""
COMPRESSION, FILE_EXTENT_TYPE = 16, 20
WRITTEN = 1  # BTRFS_FILE_EXTENT_REG
PREALLOC = 2  # BTRFS_FILE_EXTENT_PREALLOC
ROOT_V1 = struct.Struct("=160xQ32xQ8xL")
"""btrfs_root_item: generation, last_snapshot, refs."""
ROOT = struct.Struct("=160xQ32xQ8xL19xQ16s16s")
"""The same, then generation_v2, uuid, parent_uuid (Linux 3.6)."""
RANGE = struct.Struct("=QQ")

ROOT_TREE, EXTENT_TREE, FS_TREE = 1, 2, 5
RELOCATION_TREE = (1 << 64) - 8  # BTRFS_TREE_RELOC_OBJECTID
FIRST_FREE, LAST_FREE = 256, (1 << 64) - 256
EXTENT_DATA, ROOT_ITEM = 108, 132
LARGEST = (1 << 64) - 1
ALL_ITEMS = (1 << 32) - 1
NO_UUID = bytes(16)

BUFFER = 1 << 20
INODE_BUFFER = 1 << 16
"""More than the largest item; of extents, over 700."""
EXTENT_ROOM = HEADER.size + 53
"""What one more extent takes in a buffer."""
PROBES = 2000
"""Known inodes that are looked up at one look."""
INLINE_ITEMS = 100_000
"""Items of new subvolumes without a known source that one answer waits for; more are read in the background."""
LISTINGS = 100
"""Times that subvolumes may appear during one look."""

IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "armv7l": 314, "i686": 289}
IOPRIO_WHO_PROCESS, IOPRIO_CLASS_IDLE = 1, 3 << 13
SHORT_S = 0.25
"""A first scan that is over by then runs at normal priority, and a look waits for it."""
LOWEST = 19

Files = dict[int, bytes]
"""Packed (logical start, length) of its unwritten extents, by inode."""
Key = tuple[int, int, int]


def union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint (start, end) in ascending order, of any (start, length)."""
    joined: list[tuple[int, int]] = []
    first = last = -1
    for start, length in sorted(ranges):
        if start > last:
            if last > first:
                joined.append((first, last))
            first, last = start, start + length
        elif start + length > last:
            last = start + length
    if last > first:
        joined.append((first, last))
    return joined


def outside(ranges: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
    """Bytes of `ranges` that lie in none of `others`; both as `union` makes them."""
    size = sum(end - start for start, end in ranges)
    index = 0
    for start, end in ranges:
        while index < len(others) and others[index][1] <= start:
            index += 1
        at = index
        while at < len(others) and others[at][0] < end:
            size -= min(end, others[at][1]) - max(start, others[at][0])
            at += 1
    return size


def without(ranges: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of `ranges` lies in none of `others`; all as `union` makes them."""
    left: list[tuple[int, int]] = []
    index = 0
    for begin, end in ranges:
        start = begin
        while index < len(others) and others[index][1] <= start:
            index += 1
        at = index
        while at < len(others) and others[at][0] < end:
            if others[at][0] > start:
                left.append((start, others[at][0]))
            start = max(start, others[at][1])
            at += 1
        if start < end:
            left.append((start, end))
    return left


def unpack(pieces: Iterable[bytes]) -> Iterable[tuple[int, int]]:
    """The ranges of `Files` values; equal values count once."""
    joined: Iterable[tuple[int, int]] = RANGE.iter_unpack(b"".join(set(pieces)))
    return joined


def following(key: Key) -> Key | None:
    """The next key of a tree; None after the last."""
    objectid, kind, offset = key
    if offset < LARGEST:
        return objectid, kind, offset + 1
    if kind < 255:
        return objectid, kind + 1, 0
    return (objectid + 1, 0, 0) if objectid < LARGEST else None


class TooMuchError(Exception):
    """More items than an answer may wait for."""


class Subvolume(NamedTuple):
    """What one look found in a subvolume, and the generation from which the next one starts."""

    uuid: bytes
    files: Files
    since: int
    probed: int = 0
    """The inode after which the next lookup of known ones begins."""
    pending: int = 0
    """Known inodes to look up since the last change."""


class Listing:
    """What the root tree says of subvolumes."""

    def __init__(self) -> None:
        self.live: dict[int, bytes] = {}
        """UUID by tree id, of those that are not deleted."""
        self.sources: dict[bytes, bytes] = {}
        """UUID of what a snapshot was made of by its own UUID, also of deleted ones that are not cleaned up yet."""
        self.relocating: dict[int, int] = {}
        """By tree id, a generation that is older than anything in its relocation tree."""
        self.committed = 0
        """The generation of the extent tree as of the last commit."""

    def add(self, tree: int, offset: int, item: bytes) -> None:
        """Take a root item in."""
        uuid = source = NO_UUID
        if len(item) >= ROOT.size:
            generation, snapshot, refs, second, uuid, source = ROOT.unpack_from(item)
            if second != generation:  # written by a kernel that knows no UUIDs
                uuid = source = NO_UUID
        else:
            generation, snapshot, refs = ROOT_V1.unpack_from(item)
        if tree == RELOCATION_TREE:
            self.relocating[offset] = snapshot
        elif tree == EXTENT_TREE:
            self.committed = generation
        elif tree == FS_TREE or FIRST_FREE <= tree <= LAST_FREE:
            if uuid != NO_UUID:
                self.sources[uuid] = source
            if refs:
                self.live[tree] = uuid


class Trees:
    """The kernel's side: reads items of trees."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
        self._head = KEY.size + 8
        self._large = ctypes.create_string_buffer(self._head + BUFFER)
        self._small = ctypes.create_string_buffer(self._head + INODE_BUFFER)
        self.scanned = 0
        self.parts: list[tuple[int, int]] = []
        """Of the inode that was read last: what nothing refers to in extents of which it has written parts."""
        self.progress: dict[int, tuple[int, int]] = {}
        """Bytes and files by tree id, of what `read` has gone through as a whole."""
        self.budget: int | None = None
        """Items that `read` may still go through."""

    def _call(self, request: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        if self._libc.ioctl(self._fd, request, ctypes.addressof(buffer)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def generation(self) -> int:
        """Of the running transaction; of the last one while none runs."""
        buffer = ctypes.create_string_buffer(FS_INFO_SIZE)
        FS_INFO.pack_into(buffer, 0, FS_INFO_FLAG_GENERATION, 0)
        self._call(IOC_FS_INFO, buffer)
        flags, generation = FS_INFO.unpack_from(buffer)
        if not flags & FS_INFO_FLAG_GENERATION:
            raise OSError(errno.EOPNOTSUPP, "FS_INFO without generation")
        return int(generation)

    def _search(self, buffer: ctypes.Array[ctypes.c_char], tree: int, low: Key, high: Key, since: int) -> int:
        """One call; the number of items that are in the buffer."""
        KEY.pack_into(
            buffer, 0, tree, low[0], high[0], low[2], high[2], since, LARGEST, low[1], high[1], ALL_ITEMS, 0, 0, 0, 0, 0
        )
        struct.pack_into("=Q", buffer, KEY.size, len(buffer) - self._head)
        self._call(IOC_TREE_SEARCH_V2, buffer)
        count: int = KEY.unpack_from(buffer)[9]
        self.scanned += count
        return count

    def listing(self) -> Listing:
        """Every root item."""
        found = Listing()
        buffer, view = self._large, memoryview(self._large).cast("B")
        for first, high in (
            ((EXTENT_TREE, 0, 0), (LAST_FREE, ROOT_ITEM, LARGEST)),
            ((RELOCATION_TREE, ROOT_ITEM, 0), (RELOCATION_TREE, ROOT_ITEM, LARGEST)),
        ):
            low: Key | None = first
            while low is not None and low <= high and (count := self._search(buffer, ROOT_TREE, low, high, 0)):
                at = self._head
                for _ in range(count):
                    _, objectid, offset, kind, length = HEADER.unpack_from(buffer, at)
                    at += HEADER.size
                    if kind == ROOT_ITEM:
                        found.add(objectid, offset, bytes(view[at : at + length]))
                    low = following((objectid, kind, offset))
                    at += length
        return found

    def read(self, tree: int, first: int = FIRST_FREE, last: int = LAST_FREE, *, whole: bool = True) -> Files | None:
        """The unwritten extents of the inodes `first` to `last`.

        An extent counts as a whole, less what the same inode has written of it: btrfs frees it only as a whole, so room
        that nothing refers to any more is still used, and becomes free without having been written.
        Without `whole`, one call at most: None when the inodes have more extents than it brings.
        """
        one = first == last
        buffer = self._small if one else self._large
        view = memoryview(buffer).cast("B")
        found: dict[int, dict[int, int]] = {}
        referred: dict[int, int] = {}
        written: list[tuple[int, int]] = []
        parts: dict[int, int] = {}
        low: Key | None = (first, EXTENT_DATA if one else 0, 0)
        high = (last, EXTENT_DATA, LARGEST)
        total = 0
        header, extent = OBJECT_TYPE_LENGTH.unpack_from, FILE_EXTENT.unpack_from
        while low is not None and low <= high and (count := self._search(buffer, tree, low, high, 0)):
            at, length = self._head, 0
            for _ in range(count):
                objectid, kind, length = header(buffer, at)
                at += 32
                if kind == EXTENT_DATA and view[at + FILE_EXTENT_TYPE] == PREALLOC:
                    address, length_on_disk, _, size = extent(buffer, at)
                    extents = found.get(objectid)
                    if extents is None:
                        extents = found[objectid] = {}
                        referred[objectid] = 0
                    extents[address] = length_on_disk
                    referred[objectid] += size
                    total += size
                elif (
                    one
                    and kind == EXTENT_DATA
                    and view[at + FILE_EXTENT_TYPE] == WRITTEN
                    and not view[at + COMPRESSION]
                ):
                    address, length_on_disk, offset, size = extent(buffer, at)
                    written.append((address + offset, size))
                    if length_on_disk > size:
                        parts[address] = length_on_disk
                at += length
            # Of an inode, only the first extent can be longer than 53 bytes (inline).
            if one and at + EXTENT_ROOM <= len(buffer):
                break
            if not whole:
                return None
            if not one:
                self._spend(count)
                self.progress[tree] = total, len(found)
            _, objectid, offset, kind, _ = HEADER.unpack_from(buffer, at - length - HEADER.size)
            low = following((objectid, kind, offset))
        if one:
            self.parts = without(union(parts.items()), union(written))
        return self._unwritten(tree, found, referred, written if one else None)

    def _unwritten(
        self,
        tree: int,
        found: dict[int, dict[int, int]],
        referred: dict[int, int],
        written: list[tuple[int, int]] | None,
    ) -> Files:
        """Of every inode its whole extents, less what is `written` of them; None: read again where that is needed."""
        files: Files = {}
        for inode, extents in found.items():
            if sum(extents.values()) == referred[inode]:
                files[inode] = b"".join(RANGE.pack(*item) for item in extents.items())
            elif written is None:
                files.update(self.read(tree, inode, inode) or {})
            else:
                left = without(union(extents.items()), union(written))
                files[inode] = b"".join(RANGE.pack(start, end - start) for start, end in left)
        return files

    def _spend(self, count: int) -> None:
        if self.budget is not None:
            self.budget -= count
            if self.budget < 0:
                raise TooMuchError

    def changed(self, tree: int, since: int, files: Files) -> tuple[set[int], bool]:
        """Inodes to read again, those of `files` among them, and whether any leaf has changed."""
        buffer, view = self._large, memoryview(self._large).cast("B")
        touched: set[int] = set()
        any_leaf = False
        low: Key | None = (FIRST_FREE, 0, 0)
        high = (LAST_FREE, 255, LARGEST)
        header = OBJECT_TYPE_LENGTH.unpack_from
        while low is not None and (count := self._search(buffer, tree, low, high, since)):
            any_leaf = True
            at, length = self._head, 0
            for _ in range(count):
                objectid, kind, length = header(buffer, at)
                at += 32
                if objectid in files or (kind == EXTENT_DATA and view[at + FILE_EXTENT_TYPE] == PREALLOC):
                    touched.add(objectid)
                at += length
            _, objectid, offset, kind, _ = HEADER.unpack_from(buffer, at - length - HEADER.size)
            low = following((objectid, kind, offset))
        return touched, any_leaf


class Scanner:
    """What all looks have found so far. One thread at a time."""

    def __init__(self, trees: Trees) -> None:
        self.trees = trees
        self.subvolumes: dict[int, Subvolume] = {}
        self._listed: set[int] = set()
        self._balloon: Files = {}
        self._balloon_tree = 0
        self._settled = 0
        """The generation that the last pass has seen the end of, 0 while there is more to do in it."""
        self._summed: list[Files] = []
        self._sums = (0, 0)

    def look(self, balloon: int) -> tuple[int, int]:
        """(bytes, files) of all subvolumes but the balloon's. Raises OSError."""
        # A pass is no snapshot: an extent that a reflink and a deletion hand on meanwhile may be missed on both sides.
        # The second pass finds it where it went, unless it is handed on again; then the next look does.
        if self._pass(balloon, probes=PROBES):
            self._pass(balloon, probes=0)
        return self._sum()

    def _pass(self, balloon: int, probes: int) -> bool:
        """Bring everything up to date; True when something that was known is no longer there."""
        generation = self.trees.generation()
        if generation == self._settled and balloon == self._balloon_tree:
            return False
        listing = self.trees.listing()
        # A commit writes root items when no one can change trees in its transaction any more, the extent tree's last.
        settled = listing.committed == generation
        found: dict[int, Subvolume] = {}
        done: set[int] = set()
        relocating: set[int] = set()
        for _ in range(LISTINGS):
            relocating.update(listing.relocating)
            self._look_at_all(listing.live.keys() - done - {balloon}, listing, found, probes)
            done.update(listing.live)
            held = self._read_balloon(balloon)
            # Last: what is not listed now was not there when its source was read, and will be found in the source's
            # state by the next pass.
            listing = self.trees.listing()
            if done.issuperset(listing.live):
                break
        else:
            raise OSError(errno.EBUSY, "subvolumes appear faster than they are read")
        if held is not None and balloon in listing.live:
            found[balloon] = Subvolume(listing.live[balloon], held, 0)
        lost = self._lost(found)
        since = generation + 1 if settled else generation
        self.subvolumes = {
            tree: one if tree in relocating else one._replace(since=since)
            for tree, one in found.items()
            if tree in listing.live
        }
        self._listed = done
        self._balloon, self._balloon_tree = held or {}, balloon
        quiet = settled and not any(one.pending for one in self.subvolumes.values())
        self._settled = generation if quiet else 0
        return lost

    def _look_at_all(self, trees: set[int], listing: Listing, found: dict[int, Subvolume], probes: int) -> None:
        """Put into `found` what is in `trees` now."""
        before = {one.uuid: one for one in self.subvolumes.values() if one.uuid != NO_UUID}
        for tree in trees:
            with contextlib.suppress(FileNotFoundError):  # deleted, not committed
                found[tree] = self._look_at(tree, listing, before)
        pending = [tree for tree in trees if tree in found and found[tree].pending]
        if probes:
            self._probe(found, pending, probes)

    def _look_at(self, tree: int, listing: Listing, before: dict[bytes, Subvolume]) -> Subvolume:
        """What is in the subvolume now, but for known inodes that are gone without a trace."""
        uuid = listing.live[tree]
        known = self.subvolumes.get(tree)
        if known is not None and known.uuid != uuid:
            known = None
        if known is None and tree not in self._listed:
            source = uuid
            for _ in listing.sources:  # the longest that a chain can be
                source = listing.sources.get(source, NO_UUID)
                known = before.get(source)
                if known is not None or source == NO_UUID:
                    break
        if known is None:
            files = self.trees.read(tree)
            return Subvolume(uuid, files or {}, min(listing.relocating.values(), default=0))
        touched, any_leaf = self.trees.changed(tree, known.since, known.files)
        files = self._again(tree, known.files, touched)
        return known._replace(uuid=uuid, files=files, pending=len(files) if any_leaf else known.pending)

    def _again(self, tree: int, files: Files, inodes: Iterable[int], *, whole: bool = True) -> Files:
        """`files` after the inodes were read again; the same object when nothing has changed."""
        fresh = files
        for inode in inodes:
            read = self.trees.read(tree, inode, inode, whole=whole)
            if read is None:  # it is there, and has many extents
                continue
            ranges = self._still_used(read.get(inode), fresh.get(inode))
            if ranges != fresh.get(inode):
                if fresh is files:
                    fresh = dict(files)
                if ranges is None:
                    del fresh[inode]
                else:
                    fresh[inode] = ranges
        return fresh

    def _still_used(self, now: bytes | None, before: bytes | None) -> bytes | None:
        """`now`, and what was unwritten `before` in extents of which the inode still refers to written parts.

        Nothing refers to it any more, but it becomes free with the rest of its extent, and was never written.
        """
        if not before or not self.trees.parts:
            return now
        old = union(unpack([before]))
        kept = without(old, without(old, self.trees.parts))
        if not kept:
            return now
        joined = union([*unpack([now or b""]), *((start, end - start) for start, end in kept)])
        return b"".join(RANGE.pack(start, end - start) for start, end in joined)

    def _probe(self, found: dict[int, Subvolume], pending: list[int], probes: int) -> None:
        """Look known inodes up, in turns when there are too many."""
        total = sum(len(found[tree].files) for tree in pending)
        for tree in pending:
            one = found[tree]
            inodes = list(one.files)
            if total > probes and inodes:
                inodes.sort()
                start = bisect.bisect_right(inodes, one.probed) % len(inodes)
                inodes = inodes[start : start + max(probes * len(inodes) // total, 1)]
            with contextlib.suppress(FileNotFoundError):
                files = self._again(tree, one.files, inodes, whole=False)
                left = max(one.pending - len(inodes), 0) if files else 0
                found[tree] = one._replace(files=files, probed=inodes[-1] if inodes else 0, pending=left)

    def _read_balloon(self, balloon: int) -> Files | None:
        """As a whole, and without a budget: it has few files. None when there is none."""
        if not balloon:
            return None
        budget, self.trees.budget = self.trees.budget, None
        try:
            return self.trees.read(balloon)
        except FileNotFoundError:
            return None
        finally:
            self.trees.budget = budget

    def _lost(self, found: dict[int, Subvolume]) -> bool:
        for tree, one in self.subvolumes.items():
            now = found.get(tree)
            if now is None:
                if one.files:
                    return True
            elif now.files is not one.files and any(now.files.get(inode) != old for inode, old in one.files.items()):
                return True
        return False

    def _sum(self) -> tuple[int, int]:
        counted = [one.files for tree, one in self.subvolumes.items() if tree != self._balloon_tree]
        inputs = [*counted, self._balloon]
        if len(inputs) != len(self._summed) or any(a is not b for a, b in zip(inputs, self._summed, strict=True)):
            pieces = union(unpack(piece for files in counted for piece in files.values()))
            size = outside(pieces, union(unpack(self._balloon.values())))
            self._sums = size, sum(map(len, counted))
            self._summed = inputs
        return self._sums


class Server:
    """Answers looks; reads everything for the first time in a thread of idle priority."""

    def __init__(self, trees: Trees) -> None:
        self._trees = trees
        self._scanner = Scanner(trees)
        self._reading: threading.Thread | None = None
        self._failure: OSError | None = None
        self._balloon = 0

    def read_all(self) -> None:
        """Start to read, in the background, what has not been read yet; what takes longer, at idle priority."""
        self._trees.progress.clear()
        self._reading = threading.Thread(target=self._read_all, daemon=True)
        self._reading.start()

    def _read_all(self) -> None:
        later = threading.Timer(SHORT_S, _idle_priority, (threading.get_native_id(),))
        later.daemon = True
        later.start()
        try:
            self._trees.budget = None
            self._scanner.look(self._balloon)
            self._scanner.look(self._balloon)  # what has changed meanwhile
        except OSError as error:
            self._failure = error
        finally:
            later.cancel()
            _nice_session(0)

    def answer(self, balloon: int) -> bytes:
        """The line that answers one look."""
        self._balloon = balloon
        trees = self._trees
        if self._reading is not None:
            self._reading.join(SHORT_S)
            if self._reading.is_alive():
                return self._so_far(balloon)
            self._reading = None
        try:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                self.read_all()
                raise failure
            trees.budget = INLINE_ITEMS
            size, files = self._scanner.look(balloon)
        except TooMuchError:
            self.read_all()
            return self._so_far(balloon)
        except OSError as error:
            return b"error %d %s\n" % (error.errno or 0, (error.strerror or "").encode())
        return b"1 %d %d %d\n" % (size, files, trees.scanned)

    def _so_far(self, balloon: int) -> bytes:
        parts = [part for tree, part in list(self._trees.progress.items()) if tree != balloon]
        size, files = sum(part[0] for part in parts), sum(part[1] for part in parts)
        return b"0 %d %d %d\n" % (size, files, self._trees.scanned)


def _idle_priority(thread: int) -> None:
    """Processor time and I/O of the thread with this native id only as far as others leave it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, LOWEST)
    number = IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall(ctypes.c_long(number), IOPRIO_WHO_PROCESS, thread, IOPRIO_CLASS_IDLE)
    _nice_session(LOWEST)


def _nice_session(nice: int) -> None:
    """With autogroups, a thread's nice value counts only within its session."""
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as file:
        file.write(str(nice))


def main() -> None:
    """Serve until standard input ends. argv: the open filesystem's descriptor."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            requests.put(line)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    server = Server(Trees(int(sys.argv[1])))
    server.read_all()
    while True:
        _, balloon = requests.get().split()
        os.write(1, server.answer(int(balloon)))


if __name__ == "__main__":
    main()
