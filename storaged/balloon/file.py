"""The balloon file on btrfs: `<mountpoint>/.storaged-balloon/balloon`, in a subvolume of its own.

A snapshot of the parent does not reach into a nested subvolume, so no snapshot ever pins the balloon. The file is
preallocated past its end (FALLOC_FL_KEEP_SIZE): a backup reads an empty file, no data is ever written, and the
name survives a crash together with the protection.
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

SUBVOLUME = ".storaged-balloon"
NAME = "balloon"
_SUBVOLUME_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the root of every subvolume
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class BtrfsBalloonFile:
    """The balloon of the filesystem mounted at `mountpoint`. One process at a time may have it open."""

    def __init__(self, mountpoint: str) -> None:
        self._root = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._mountpoint = mountpoint
        self._fd = -1
        try:
            self._find()
        except BaseException:
            os.close(self._root)
            raise

    def close(self) -> None:
        """Let go of it; the balloon stays."""
        for fd in (self._fd, self._root):
            if fd >= 0:
                os.close(fd)
        self._fd = self._root = -1

    def _find(self) -> None:
        """Open the file if it is there; a balloon that a stopped daemon left is found again."""
        try:
            directory = os.open(SUBVOLUME, _DIRECTORY, dir_fd=self._root)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._foreign(error.strerror or "") from error
        try:
            self._check(os.fstat(directory))
            try:
                fd = os.open(NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            except FileNotFoundError:
                return
            except OSError as error:
                raise self._foreign(error.strerror or "") from error
            self._take(fd)
        finally:
            os.close(directory)

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISDIR(found.st_mode) or found.st_ino != _SUBVOLUME_INODE or found.st_uid != os.geteuid():
            raise self._foreign("it is not a subvolume of this user's")

    def _foreign(self, why: str) -> FilesystemError:
        path = f"{self._mountpoint}/{SUBVOLUME}"
        return FilesystemError(f"{path} is in the way of the balloon: {why}", errno.EEXIST, Kind.PRECONDITION)

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise FilesystemError(
                f"another storaged holds the balloon of {self._mountpoint}", errno.EBUSY, Kind.BUSY
            ) from error
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            os.close(fd)
            raise self._foreign("the balloon is not a plain file")
        self._fd = fd
        self._subvolume: int = btrfsutil.subvolume_id(fd)

    def _open(self) -> int:
        """The file's descriptor; subvolume and file are made when they are first needed."""
        if self._fd >= 0:
            return self._fd
        path = f"{self._mountpoint}/{SUBVOLUME}"
        with kernel("making the balloon's subvolume"):
            try:
                directory = os.open(SUBVOLUME, _DIRECTORY, dir_fd=self._root)
            except FileNotFoundError:
                try:
                    btrfsutil.create_subvolume(path)
                except btrfsutil.BtrfsUtilError as error:
                    raise OSError(error.errno, str(error)) from error
                directory = os.open(SUBVOLUME, _DIRECTORY, dir_fd=self._root)
        try:
            self._check(os.fstat(directory))
            os.fchmod(directory, 0o700)
            with kernel("making the balloon file"):
                fd = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
            self._take(fd)
        finally:
            os.close(directory)
        return self._fd

    def size(self) -> int:
        return os.fstat(self._fd).st_blocks * 512 if self._fd >= 0 else 0

    def extend(self, size: int) -> None:
        fd = self._open()
        extents = self._extents()
        end = extents[-1][0] + extents[-1][2] if extents else 0
        with kernel(f"taking {size} bytes for the balloon"):
            ioctl.fallocate(fd, ioctl.FALLOC_FL_KEEP_SIZE, end, size)

    def shrink(self, size: int) -> None:
        for offset, _, length in reversed(self._extents()):
            if size <= 0:
                return
            self._punch(offset, length)
            size -= length

    def extents(self) -> list[tuple[int, int]]:
        return [(address, length) for _, address, length in self._extents()]

    def vacate(self, ranges: list[tuple[int, int]]) -> int:
        given = 0
        for offset, address, length in self._extents():
            if any(start < address + length and address < start + span for start, span in ranges):
                self._punch(offset, length)
                given += length
        return given

    def _extents(self) -> list[tuple[int, int, int]]:
        """As they lie on the disk: a hole in a part of an extent would give nothing back."""
        if self._fd < 0:
            return []
        with kernel("reading the balloon's extents"):
            return search.file_extents(self._fd, self._subvolume, os.fstat(self._fd).st_ino)

    def _punch(self, offset: int, length: int) -> None:
        with kernel(f"giving {length} bytes of the balloon back"):
            ioctl.fallocate(self._fd, ioctl.FALLOC_FL_KEEP_SIZE | ioctl.FALLOC_FL_PUNCH_HOLE, offset, length)

    def remove(self) -> None:
        with kernel("removing the balloon"):
            if self._fd >= 0:
                os.ftruncate(self._fd, 0)
                os.close(self._fd)
                self._fd = -1
            try:
                directory = os.open(SUBVOLUME, _DIRECTORY, dir_fd=self._root)
            except FileNotFoundError:
                return
            try:
                self._check(os.fstat(directory))
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(NAME, dir_fd=directory)
            finally:
                os.close(directory)
            try:
                btrfsutil.delete_subvolume(f"{self._mountpoint}/{SUBVOLUME}")
            except btrfsutil.BtrfsUtilError as error:
                raise OSError(error.errno, str(error)) from error
