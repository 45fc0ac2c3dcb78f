"""Kernel interfaces that no library offers, as thin functions: number, structure and call side by side.

Numbers from include/uapi/linux/btrfs.h, fs.h and falloc.h, unchanged since Linux 5.14 unless noted. Calls that
can block for long go through ctypes, which releases the GIL whatever the argument's size (fcntl.ioctl keeps it
for arguments over 1024 bytes).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

IOC_RESIZE = 0x50009403  # _IOW(0x94, 3, struct btrfs_ioctl_vol_args)
IOC_SYNC = 0x9408  # _IO(0x94, 8)
FITRIM = 0xC0185879  # _IOWR('X', 121, struct fstrim_range)
FS_IOC_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap)

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

_VOL_ARGS = struct.Struct("=q4088s")  # btrfs_ioctl_vol_args: fd, name
_FSTRIM_RANGE = struct.Struct("=QQQ")  # start, len, minlen
_FIEMAP = struct.Struct("=QQLLLL")  # start, length, flags, mapped, count, reserved
_FIEMAP_EXTENT = struct.Struct("=QQQ16xL12x")  # logical (in the file), physical, length, flags
_FIEMAP_LAST = 0x1
_EXTENTS_PER_CALL = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes, which os.posix_fallocate does not have. Raises OSError."""
    _check(_libc.fallocate(fd, mode, offset, length))


def resize(fd: int, argument: str) -> int:
    """BTRFS_IOC_RESIZE with `[devid:]size` or `cancel`; blocks for all of the relocation.

    Returns 0, or a positive number when an exclusive operation is in the way (BTRFS_ERROR_DEV_EXCL_RUN_IN_PROGRESS
    is 8). Raises OSError.
    """
    buffer = ctypes.create_string_buffer(_VOL_ARGS.pack(0, argument.encode()), _VOL_ARGS.size)
    return _check(_libc.ioctl(fd, IOC_RESIZE, ctypes.addressof(buffer)))


def sync(fd: int) -> None:
    """Commit the running transaction and wake the kernel's cleaner. Raises OSError."""
    fcntl.ioctl(fd, IOC_SYNC)


def trim(fd: int) -> int:
    """FITRIM over the whole filesystem; bytes discarded as the kernel counts. Raises OSError."""
    buffer = bytearray(_FSTRIM_RANGE.pack(0, (1 << 64) - 1, 0))
    fcntl.ioctl(fd, FITRIM, buffer)
    return int(_FSTRIM_RANGE.unpack(buffer)[1])


def file_extents(fd: int) -> list[tuple[int, int, int]]:
    """(offset in the file, logical address, length) of every extent, also past the end of the file."""
    found: list[tuple[int, int, int]] = []
    start = 0
    size = _FIEMAP.size + _EXTENTS_PER_CALL * _FIEMAP_EXTENT.size
    while True:
        buffer = ctypes.create_string_buffer(
            _FIEMAP.pack(start, (1 << 64) - 1 - start, 0, 0, _EXTENTS_PER_CALL, 0), size
        )
        _check(_libc.ioctl(fd, FS_IOC_FIEMAP, ctypes.addressof(buffer)))
        mapped = _FIEMAP.unpack_from(buffer)[3]
        flags = 0
        for index in range(mapped):
            offset, address, length, flags = _FIEMAP_EXTENT.unpack_from(
                buffer, _FIEMAP.size + index * _FIEMAP_EXTENT.size
            )
            found.append((offset, address, length))
            start = offset + length
        if not mapped or flags & _FIEMAP_LAST:
            return found
