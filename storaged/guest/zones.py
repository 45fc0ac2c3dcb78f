"""The time zone database and /etc/localtime beneath a root, behind `guest.clock.ZonePort`."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from storaged.errors import StoragedError
from storaged.guest.clock import ClockSettings
from storaged.guest.files import RESOLVE_BENEATH, directory_of, openat2, opened, replace_link, told

MS_BIND = 4096  # include/uapi/linux/mount.h
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
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
        if not _is_zone(zone):
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


def _is_zone(fd: int) -> bool:
    """True when the file can be read as a zone (RFC 9636)."""
    import struct
    from zoneinfo import ZoneInfo

    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    try:
        with open(fd, "rb", closefd=False) as file:
            ZoneInfo.from_file(file)
    except (ValueError, struct.error, IndexError, EOFError):
        return False
    return True
