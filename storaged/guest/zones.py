"""The time zone database and /etc/localtime beneath a root, behind `guest.clock.ZonePort`."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

from storaged.errors import StoragedError
from storaged.guest.clock import ClockSettings
from storaged.guest.files import RESOLVE_BENEATH, directory_of, openat2, opened, replace_link, told

MS_BIND = 4096  # include/uapi/linux/mount.h
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
LARGEST_ZONE = 1 << 20
"""A zone has a few thousand bytes."""
_HEADER = struct.Struct("!4s16s6L")
_NO_SUCH_ZONE = (errno.ENOENT, errno.ENOTDIR, errno.EXDEV, errno.ELOOP)


class ZoneFiles:
    """The local zone as a symbolic link, or as a file that is mounted over it where the root is read-only."""

    def __init__(self, settings: ClockSettings | None = None, root: str = "/") -> None:
        self._settings = settings or ClockSettings()
        self._root = root
        self._libc = ctypes.CDLL(None, use_errno=True)

    def set_zone(self, name: str, *, bind: bool) -> None:
        local = self._settings.localtime
        with (
            told(f"time zone {name}"),
            opened(self._root, self._settings.zoneinfo, os.O_RDONLY | os.O_DIRECTORY) as database,
        ):
            zone = self._open_zone(database, name)
        try:
            with told(f"setting {local} to {name}"), directory_of(self._root, local) as (directory, entry):
                if bind:
                    self._mount(zone, directory, entry)
                else:
                    self._link(directory, entry, f"{self._settings.zoneinfo}/{name}")
        finally:
            os.close(zone)

    def _open_zone(self, database: int, name: str) -> int:
        """The zone's file. A link in the database that leads out of it (to the local zone, say) is no zone."""
        try:
            zone = openat2(database, name, os.O_RDONLY | os.O_NONBLOCK, RESOLVE_BENEATH)
        except OSError as error:
            if error.errno in _NO_SUCH_ZONE:
                raise StoragedError(f"timezone_name {name!r}: there is no such time zone") from error
            raise
        if not stat.S_ISREG(os.fstat(zone).st_mode) or not is_zone(os.pread(zone, LARGEST_ZONE, 0)):
            os.close(zone)
            raise StoragedError(f"timezone_name {name!r}: what has this name is not a time zone")
        return zone

    def _link(self, directory: int, entry: str, target: str) -> None:
        try:
            replace_link(directory, entry, target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            self._unmount(directory, entry)  # an earlier call's mount
            replace_link(directory, entry, target)

    def _mount(self, zone: int, directory: int, entry: str) -> None:
        self._unmount(directory, entry)
        # Onto the link itself: what it points to may be another zone's file.
        target = os.open(entry, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            self._call("mount", _held(zone), _held(target), None, ctypes.c_ulong(MS_BIND), None)
        finally:
            os.close(target)

    def _unmount(self, directory: int, entry: str) -> None:
        """Take away every mount on the entry; none is left when there was none."""
        path = os.fsencode(f"/proc/self/fd/{directory}/{entry}")
        while True:
            try:
                self._call("umount2", path, MNT_DETACH | UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno == errno.EINVAL:  # not a mount point
                    return
                raise

    def _call(self, function: str, *args: object) -> None:
        if getattr(self._libc, function)(*args):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _held(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd


def is_zone(data: bytes) -> bool:
    """True for a whole file of a time zone (RFC 9636).

    By its counts: Python's own reader waits for ever at the end of a file that was cut short.
    """
    end = _block_end(data, 0, 4)
    if end is None or data[4:5] == b"\0":  # of version 1, which has one block and nothing behind it
        return end is not None
    end = _block_end(data, end, 8)
    return end is not None and len(data) >= end + 2 and data[end : end + 1] == data[-1:] == b"\n"


def _block_end(data: bytes, start: int, time_size: int) -> int | None:
    """Where the block ends that starts there; None when it is none, or not whole."""
    if len(data) < start + _HEADER.size:
        return None
    magic, _, uts, standards, leaps, times, types, characters = _HEADER.unpack_from(data, start)
    size = times * (time_size + 1) + types * 6 + characters + leaps * (time_size + 4) + standards + uts
    end: int = start + _HEADER.size + size
    return end if magic == b"TZif" and types and characters and end <= len(data) else None
