"""The balloon on btrfs: preallocated files in `<mountpoint>/.storaged-balloon`, a subvolume of its own.

A snapshot of the parent does not reach into a nested subvolume, so no snapshot ever pins the balloon. The files are
preallocated past their end (FALLOC_FL_KEEP_SIZE): a backup reads empty files, no data is ever written, and the
names survive a crash together with the protection.

There are several files because of how room is given back. A hole punched at the end is exact, but the kernel wants
metadata for it, and refuses with ENOSPC once metadata has run out. Cutting a whole file away draws on the global
reserve and works even then. So no file holds more than about one chunk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

import btrfsutil

from storaged.btrfs import ioctl, search
from storaged.btrfs.filesystem import kernel
from storaged.errors import FilesystemError, Kind
from storaged.resize.fit import data_chunk
from storaged.units import sector_floor

SUBVOLUME = ".storaged-balloon"
MOST_SEGMENTS = 1024
NUDGE = "0"
"""A name that no segment has for longer than a moment; empty, so a crash leaves a segment that holds nothing."""
_SUBVOLUME_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the root of every subvolume
_LAST_INODE = (1 << 64) - 257  # BTRFS_LAST_FREE_OBJECTID
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def segment_size(filesystem_size: int) -> int:
    """Bytes a segment holds at most: a data chunk, and no more than 2048 segments in all, half of that as a rule."""
    return sector_floor(max(data_chunk(filesystem_size), filesystem_size // MOST_SEGMENTS))


class BtrfsBalloonFile:
    """The balloon of the filesystem mounted at `mountpoint`. One process at a time may have it open."""

    def __init__(self, mountpoint: str) -> None:
        self._root = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._mountpoint = mountpoint
        self._directory = -1
        self._subvolume = 0
        try:
            self._lock()
            self._find()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it; the balloon stays."""
        for fd in (self._directory, self._root):
            if fd >= 0:
                os.close(fd)
        self._directory = self._root = -1

    def _lock(self) -> None:
        """Be the only one: a lock on the filesystem's root, which is there before any balloon is."""
        try:
            fcntl.flock(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FilesystemError(
                f"another storaged holds the balloon of {self._mountpoint}", errno.EBUSY, Kind.BUSY
            ) from error

    def _find(self) -> None:
        """Open it if it is there; a balloon that a stopped daemon left is found again."""
        try:
            self._directory = os.open(SUBVOLUME, _DIRECTORY, dir_fd=self._root)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._foreign(error.strerror or "") from error
        self._take()

    def _open(self) -> int:
        """The subvolume's descriptor; it is made when it is first needed."""
        self._look_again()
        if self._directory >= 0:
            return self._directory
        with kernel("making the balloon's subvolume"):
            try:
                btrfsutil.create_subvolume(f"{self._mountpoint}/{SUBVOLUME}")
            except btrfsutil.BtrfsUtilError as error:
                raise OSError(error.errno, str(error)) from error
            self._directory = os.open(SUBVOLUME, _DIRECTORY, dir_fd=self._root)
            os.fchmod(self._directory, 0o700)
        self._take()
        return self._directory

    def _take(self) -> None:
        """Make sure that it is ours, and a subvolume."""
        found = os.fstat(self._directory)
        if found.st_ino != _SUBVOLUME_INODE or found.st_uid != os.geteuid():
            raise self._foreign("it is not a subvolume of this user's")
        with kernel("finding the balloon's subvolume"):
            try:
                self._subvolume = btrfsutil.subvolume_id(self._directory)
            except btrfsutil.BtrfsUtilError as error:
                raise OSError(error.errno, str(error)) from error

    def _foreign(self, why: str) -> FilesystemError:
        path = f"{self._mountpoint}/{SUBVOLUME}"
        return FilesystemError(f"{path} is in the way of the balloon: {why}", errno.EEXIST, Kind.PRECONDITION)

    def _segments(self) -> dict[int, str]:
        """Name by inode of every segment, oldest first."""
        self._look_again()
        if self._directory < 0:
            return {}
        found = {}
        with kernel("reading the balloon"):
            # Opened anew for every look: btrfs shows a descriptor the directory as it was when it was opened, and
            # threads that read through one descriptor share its place.
            fresh = os.open(".", _DIRECTORY, dir_fd=self._directory)
            try:
                with os.scandir(fresh) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        self._check_segment(entry)
                        found[entry.inode()] = entry.name
            finally:
                os.close(fresh)
        return found

    def _check_segment(self, entry: os.DirEntry[str]) -> None:
        """What is not a segment is never touched: ours are numbered, and empty to whoever reads them."""
        plain = entry.name.isascii() and entry.name.isdigit() and entry.is_file(follow_symlinks=False)
        if not plain or entry.stat(follow_symlinks=False).st_size:
            raise self._foreign(f"{entry.name!r} is not the balloon's")

    def _look_again(self) -> None:
        """Let go of a subvolume that somebody has deleted or replaced behind our back."""
        if self._directory < 0:
            return
        ours = os.fstat(self._directory)
        try:
            there = os.stat(SUBVOLUME, dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            os.close(self._directory)
            self._directory = -1
            if there is not None:
                self._find()

    def _opened(self, name: str, *, create: bool = False) -> int:
        fd = os.open(name, _FILE | (os.O_CREAT if create else 0), 0o600, dir_fd=self._directory)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._foreign(f"{name!r} is not a plain file")
        return fd

    @property
    def root_id(self) -> int:
        return self._subvolume if self._directory >= 0 else 0

    @property
    def found(self) -> list[tuple[str, bool]]:
        return []

    def nudge(self) -> None:
        """Creating a file is a transaction that reserves metadata (start_transaction, fs/btrfs/transaction.c)."""
        if self._directory < 0:
            return
        with contextlib.suppress(OSError):
            os.close(os.open(NUDGE, _FILE | os.O_CREAT, 0o600, dir_fd=self._directory))
        with contextlib.suppress(OSError):
            os.unlink(NUDGE, dir_fd=self._directory)

    def size(self) -> int:
        return sum(
            os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_blocks * 512
            for name in self._segments().values()
        )

    def extend(self, size: int) -> None:
        self._open()
        most = segment_size(os.fstatvfs(self._directory).f_blocks * os.fstatvfs(self._directory).f_frsize)
        segments = self._segments()
        extents = self._extents()
        name = next(reversed(segments.values()), "")
        last = next(reversed(segments), 0)
        end = max((offset + length for inode, offset, _, length in extents if inode == last), default=0)
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
            for holder, offset, _, length in self._extents():
                if holder == inode and offset >= start:
                    self._punch(name, offset, length)

    def shrink(self, size: int) -> None:
        segments = self._segments()
        held = [extent for extent in self._extents() if extent[0] in segments]
        order = {inode: index for index, inode in enumerate(segments)}
        held.sort(key=lambda extent: (order[extent[0]], extent[1]))
        while held and size > 0:
            inode, offset, _, length = held[-1]
            size -= self._give(segments[inode], offset, length)
            gone = os.stat(segments[inode], dir_fd=self._directory).st_blocks == 0
            held = [extent for extent in held[:-1] if not (gone and extent[0] == inode)]
            if gone:
                self._drop(segments[inode])

    def extents(self) -> list[tuple[int, int]]:
        return [(address, length) for _, _, address, length in self._extents()]

    def vacate(self, ranges: list[tuple[int, int]]) -> int:
        segments = self._segments()
        given = 0
        for inode, offset, address, length in self._extents():
            if any(start < address + length and address < start + span for start, span in ranges):
                given += self._give(segments[inode], offset, length)
        return given

    def _extents(self) -> list[tuple[int, int, int, int]]:
        """(inode, offset, logical start, length), as they lie on the disk: a hole in a part would free nothing."""
        if self._directory < 0:
            return []
        with kernel("reading the balloon's extents"):
            return search.file_extents(self._directory, self._subvolume, _SUBVOLUME_INODE + 1, _LAST_INODE)

    def _give(self, name: str, offset: int, length: int) -> int:
        """Give one extent back; the whole segment where metadata has no room for less. Bytes given."""
        try:
            self._punch(name, offset, length)
        except FilesystemError as error:
            if error.errno != errno.ENOSPC:
                raise
            held = os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_blocks * 512
            with kernel(f"giving a segment of {held} bytes back"):
                fd = self._opened(name)
                try:
                    os.ftruncate(fd, 0)
                finally:
                    os.close(fd)
            return held
        return length

    def _punch(self, name: str, offset: int, length: int) -> None:
        with kernel(f"giving {length} bytes of the balloon back"):
            fd = self._opened(name)
            try:
                ioctl.fallocate(fd, ioctl.FALLOC_FL_KEEP_SIZE | ioctl.FALLOC_FL_PUNCH_HOLE, offset, length)
            finally:
                os.close(fd)

    def _drop(self, name: str) -> None:
        with kernel("removing a segment of the balloon"), contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory)

    def remove(self) -> None:
        self._look_again()
        if self._directory < 0:
            return
        for name in self._segments().values():
            self._drop(name)
        os.close(self._directory)
        self._directory = -1
        with kernel("removing the balloon's subvolume"):
            try:
                btrfsutil.delete_subvolume(f"{self._mountpoint}/{SUBVOLUME}")
            except btrfsutil.BtrfsUtilError as error:
                raise OSError(error.errno, str(error)) from error
