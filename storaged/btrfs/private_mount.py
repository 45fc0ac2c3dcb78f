"""The top-level subvolume of a mounted btrfs, through a mount that appears in no mount table.

The mount is detached: it exists as long as a descriptor of it is open. fsopen(2), fsconfig(2) and fsmount(2) exist
since Linux 5.2 and have no functions in the C library of Debian 12; numbers from include/uapi/asm-generic/unistd.h
and include/uapi/linux/mount.h.
"""

from __future__ import annotations

import ctypes
import errno
import os

import btrfs

FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432  # the same on every architecture
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
TOP_LEVEL = 5  # BTRFS_FS_TREE_OBJECTID

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def top_level(fd: int) -> int:
    """A directory descriptor of the top-level subvolume of the btrfs that `fd` is on. Raises OSError.

    Its path lookups cross no mount that was made on top of the filesystem. It never changes whether the filesystem
    is read-only: the kernel takes a mount that asks for `ro` as it finds it, and one that asks for `rw` to mean it.
    """
    fsid = btrfs.ioctl.fs_info(fd).fsid
    mount = _mount(_device(fd, str(fsid)))
    try:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)  # `mount` is O_PATH
    finally:
        os.close(mount)
    try:
        if btrfs.ioctl.fs_info(directory).fsid != fsid:
            raise OSError(errno.ENODEV, "another filesystem is on that device")
    except BaseException:
        os.close(directory)
        raise
    return directory


def _mount(device: str) -> int:
    context = _call(FSOPEN, b"btrfs", FSOPEN_CLOEXEC)
    try:
        _call(FSCONFIG, context, FSCONFIG_SET_STRING, b"source", os.fsencode(device), 0)
        _call(FSCONFIG, context, FSCONFIG_SET_STRING, b"subvolid", str(TOP_LEVEL).encode(), 0)
        _call(FSCONFIG, context, FSCONFIG_SET_FLAG, b"ro", None, 0)
        _call(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(FSMOUNT, context, FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def _device(fd: int, fsid: str) -> str:
    """A node of the filesystem's device; the kernel's own name may be one that is gone (/dev/root) or another's."""
    devices = f"/sys/fs/btrfs/{fsid}/devices"
    names = os.listdir(devices)
    numbers = set()
    for name in names:
        with open(f"{devices}/{name}/dev", encoding="ascii") as file:
            numbers.add(file.read().strip())
    known = btrfs.ioctl.dev_info(fd, btrfs.ioctl.fs_info(fd).max_id).path
    for path in (known, *(f"/dev/{name.replace('!', '/')}" for name in names)):
        try:
            number = os.stat(path).st_rdev
        except OSError:
            continue
        if f"{os.major(number)}:{os.minor(number)}" in numbers:
            return str(path)
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
