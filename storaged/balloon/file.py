"""The balloon on btrfs: preallocated files in a subvolume of its own, `<mountpoint>/.storaged-balloon` (see `place`).

A snapshot of the parent does not reach into a nested subvolume, so no snapshot ever pins the balloon. The files are
preallocated past their end (FALLOC_FL_KEEP_SIZE): a backup reads empty files, no data is ever written, and the
names survive a crash together with the protection.

There are several files because of how room is given back. A hole punched at the end is exact, but the kernel wants
metadata for it, and refuses with ENOSPC once metadata has run out. Cutting a whole file away draws on the global
reserve and works even then. So no file holds more than about one chunk.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import stat
from collections.abc import Callable
from itertools import accumulate, groupby

from storaged.balloon import shape
from storaged.balloon.place import Place
from storaged.balloon.shape import DIRECTORY, FILE, Segment
from storaged.btrfs import ioctl, search, subvolumes
from storaged.btrfs.filesystem import kernel
from storaged.errors import FilesystemError, Kind
from storaged.resize.fit import data_chunk
from storaged.units import sector_floor

MOST_SEGMENTS = 1024


def segment_size(filesystem_size: int) -> int:
    """Bytes a segment holds at most: a data chunk, and no more than 2048 segments in all, half of that as a rule."""
    return sector_floor(max(data_chunk(filesystem_size), filesystem_size // MOST_SEGMENTS))


class BtrfsBalloonFile:
    """The balloon of the filesystem mounted at `mountpoint`. One process at a time may have it open.

    With `look_only` nothing is changed by opening it.
    """

    def __init__(self, mountpoint: str, *, look_only: bool = False) -> None:
        self._mountpoint = mountpoint
        self._directory = -1
        self._name = ""
        self._subvolume = 0
        self._place = Place(mountpoint, look_only=look_only)
        try:
            with kernel("looking for the balloon"):
                self._find()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it; the balloon stays."""
        self._forget()
        self._place.close()

    @property
    def root_id(self) -> int:
        return self._subvolume

    @property
    def found(self) -> list[tuple[str, bool]]:
        return self._place.found

    def _forget(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
        self._directory, self._name, self._subvolume = -1, "", 0

    def _find(self) -> None:
        """Open it if it is there. Raises OSError."""
        for name, found in self._place.balloons()[:1]:
            self._take(name)
            if self._subvolume != found.root_id:
                raise self._foreign(name, "it was replaced meanwhile")

    def _take(self, name: str) -> None:
        self._directory = os.open(name, DIRECTORY, dir_fd=self._place.root)
        self._name = name
        self._subvolume = subvolumes.root_id(self._directory)

    def _open(self) -> int:
        """The subvolume's descriptor; it is made when it is first needed."""
        self._look_again()
        if self._directory >= 0:
            return self._directory
        with kernel("making the balloon's subvolume"):
            self._find()
            if self._directory < 0:
                name = self._place.free_name()
                ioctl.create_subvolume(self._place.root, name)
                self._take(name)
                os.fchmod(self._directory, 0o700)
        return self._directory

    def _foreign(self, name: str, why: str) -> FilesystemError:
        path = f"{self._mountpoint}/{name}"
        return FilesystemError(f"{path} is in the way of the balloon: {why}", errno.EEXIST, Kind.PRECONDITION)

    def _segments(self) -> list[Segment]:
        """Every segment, oldest first."""
        self._look_again()
        if self._directory < 0:
            return []
        with kernel("reading the balloon"):
            try:
                return shape.segments(self._directory)
            except shape.NotOurs as error:
                raise self._foreign(self._name, str(error)) from error

    def _look_again(self) -> None:
        """Let go of a subvolume that was deleted or replaced by others."""
        if self._directory < 0:
            return
        try:
            there = os.stat(self._name, dir_fd=self._place.root, follow_symlinks=False)
        except FileNotFoundError:
            self._forget()
            return
        if not os.path.samestat(there, os.fstat(self._directory)):
            self._forget()
            with kernel("looking for the balloon"):
                self._find()

    def _opened(self, name: str, *, create: bool = False) -> int:
        fd = os.open(name, FILE | (os.O_CREAT if create else 0), 0o600, dir_fd=self._directory)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._foreign(self._name, f"{name!r} is not a plain file")
        return fd

    def size(self) -> int:
        return sum(segment.held for segment in self._segments())

    def extend(self, size: int) -> None:
        self._open()
        whole = os.fstatvfs(self._directory)
        most = segment_size(whole.f_blocks * whole.f_frsize)
        last = max(self._segments(), key=lambda segment: segment.name, default=None)
        name = last.name if last else ""
        end = max((offset + length for offset, _, length in self._extents_of(last)), default=0) if last else 0
        taken: list[tuple[str, int]] = []
        try:
            with kernel(f"taking {size} bytes for the balloon"):
                while size > 0:
                    # In one piece where it can be: two of them may lie in two places, where only one was meant.
                    if not name or end >= most or (size <= most and end + size > most):
                        name, end = f"{int(name or 0) + 1:08}", 0
                    part = min(size, most - end)
                    # Before the call: a refused one may still have made the file.
                    taken.append((name, end))
                    self._allocate(name, end, part)
                    size -= part
                    end += part
        except FilesystemError:
            for done, start in taken:  # all or nothing
                self._cut(done, start)
            raise

    def _allocate(self, name: str, offset: int, length: int) -> None:
        fd = self._opened(name, create=True)
        try:
            ioctl.fallocate(fd, ioctl.FALLOC_FL_KEEP_SIZE, offset, length)
        finally:
            os.close(fd)

    def _cut(self, name: str, start: int) -> None:
        """Undo what a refused `extend` had taken from `start` on; a segment it began goes altogether."""
        with contextlib.suppress(FilesystemError, OSError):
            if start == 0:
                self._drop(name)
                return
            inode = os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_ino
            for offset, _, length in self._extents_of(Segment(name, inode, 0)):
                if offset >= start:
                    self._punch(name, offset, length)

    def shrink(self, size: int) -> None:
        for segment in reversed(self._segments()):
            if size <= 0:
                return
            if segment.held <= size:
                self._drop(segment.name)
                size -= segment.held
                continue
            for offset, _, length in reversed(self._extents_of(segment)):
                if size <= 0:
                    return
                given, whole = self._give(segment, offset, length)
                size -= given
                if whole:
                    break

    def extents(self) -> list[tuple[int, int]]:
        return [(address, length) for _, _, address, length in self._extents()]

    def vacate(self, ranges: list[tuple[int, int]]) -> int:
        touches = _touching(ranges)
        segments = {segment.inode: segment for segment in self._segments()}
        given = 0
        for inode, group in groupby(self._extents(), key=lambda extent: extent[0]):
            extents = list(group)
            touched = [(offset, length) for _, offset, address, length in extents if touches(address, length)]
            segment = segments.get(inode)
            if segment is None or not touched:
                continue
            if len(touched) == len(extents):
                self._drop(segment.name)
                given += sum(length for _, length in touched)
                continue
            for offset, length in touched:
                part, whole = self._give(segment, offset, length)
                given += part
                if whole:
                    break
        return given

    def _extents(self) -> list[tuple[int, int, int, int]]:
        """(inode, offset, logical start, length), as they lie on the disk: a hole in a part would free nothing."""
        if self._directory < 0:
            return []
        with kernel("reading the balloon's extents"):
            return search.file_extents(self._directory, self._subvolume, subvolumes.FIRST + 1, subvolumes.LAST)

    def _extents_of(self, segment: Segment) -> list[tuple[int, int, int]]:
        """The same of one segment, by their offset."""
        with kernel("reading the balloon's extents"):
            found = search.file_extents(self._directory, self._subvolume, segment.inode, segment.inode)
        return [(offset, address, length) for _, offset, address, length in found]

    def _give(self, segment: Segment, offset: int, length: int) -> tuple[int, bool]:
        """Give one extent back; the whole segment where metadata has no room for less. Bytes given, and which."""
        try:
            self._punch(segment.name, offset, length)
        except FilesystemError as error:
            if error.errno != errno.ENOSPC:
                raise
            held = os.stat(segment.name, dir_fd=self._directory, follow_symlinks=False).st_blocks * 512
            self._drop(segment.name)
            return held, True
        return length, False

    def _punch(self, name: str, offset: int, length: int) -> None:
        with kernel(f"giving {length} bytes of the balloon back"):
            fd = self._opened(name)
            try:
                ioctl.fallocate(fd, ioctl.FALLOC_FL_KEEP_SIZE | ioctl.FALLOC_FL_PUNCH_HOLE, offset, length)
            finally:
                os.close(fd)

    def _drop(self, name: str) -> None:
        with kernel("removing a segment of the balloon"), contextlib.suppress(FileNotFoundError):
            shape.drop(self._directory, name)

    def remove(self) -> None:
        self._look_again()
        if self._directory < 0:
            return
        for segment in self._segments():
            self._drop(segment.name)
        identity = self._subvolume
        self._forget()
        with kernel("removing the balloon's subvolume"):
            ioctl.delete_subvolume(self._place.root, identity)


def _touching(ranges: list[tuple[int, int]]) -> Callable[[int, int], bool]:
    """A function that tells whether (start, length) touches one of the ranges, which may overlap."""
    ordered = sorted(ranges)
    starts = [start for start, _ in ordered]
    ends = list(accumulate((start + span for start, span in ordered), max))

    def touches(start: int, length: int) -> bool:
        index = bisect.bisect_left(starts, start + length)
        return index > 0 and ends[index - 1] > start

    return touches
