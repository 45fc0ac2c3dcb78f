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
IOC_SUBVOL_CREATE = 0x5000940E  # _IOW(0x94, 14, struct btrfs_ioctl_vol_args)
IOC_SNAP_DESTROY_V2 = 0x5000943F  # _IOW(0x94, 63, struct btrfs_ioctl_vol_args_v2), since Linux 5.7
SUBVOL_SPEC_BY_ID = 1 << 4
IOC_SYNC = 0x9408  # _IO(0x94, 8)
IOC_BALANCE_CTL = 0x40049421  # _IOW(0x94, 33, int)
BALANCE_CTL_CANCEL = 2
FITRIM = 0xC0185879  # _IOWR('X', 121, struct fstrim_range)
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

_VOL_ARGS = struct.Struct("=q4088s")  # btrfs_ioctl_vol_args: fd, name
_VOL_ARGS_V2_BY_ID = struct.Struct("=qQQ32xQ4032x")  # btrfs_ioctl_vol_args_v2: fd, transid, flags, -, subvolid
_FSTRIM_RANGE = struct.Struct("=QQQ")  # start, len, minlen

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def call(fd: int, request: int, address: int) -> int:
    """ioctl(2) on the structure at `address`, without the GIL. Raises OSError."""
    return _check(_libc.ioctl(fd, request, address))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes, which os.posix_fallocate does not have. Raises OSError."""
    _check(_libc.fallocate(fd, mode, offset, length))


def cancel_resize(fd: int) -> None:
    """BTRFS_IOC_RESIZE with `cancel`; returns when the resize has ended. Raises OSError, ENOTCONN when none runs."""
    buffer = ctypes.create_string_buffer(_VOL_ARGS.pack(0, b"cancel"), _VOL_ARGS.size)
    call(fd, IOC_RESIZE, ctypes.addressof(buffer))


def cancel_balance(fd: int) -> None:
    """Cancel the balance that runs or is paused; returns when it has ended. Raises OSError, ENOTCONN when none is."""
    fcntl.ioctl(fd, IOC_BALANCE_CTL, BALANCE_CTL_CANCEL)


def create_subvolume(fd: int, name: str) -> None:
    """Make a subvolume in the directory `fd`. Raises OSError."""
    buffer = ctypes.create_string_buffer(_VOL_ARGS.pack(0, os.fsencode(name)), _VOL_ARGS.size)
    call(fd, IOC_SUBVOL_CREATE, ctypes.addressof(buffer))


def delete_subvolume(fd: int, identity: int) -> None:
    """Delete the subvolume with this id, wherever on the filesystem it lies: no path could be swapped. OSError."""
    arguments = _VOL_ARGS_V2_BY_ID.pack(0, 0, SUBVOL_SPEC_BY_ID, identity)
    buffer = ctypes.create_string_buffer(arguments, _VOL_ARGS_V2_BY_ID.size)
    call(fd, IOC_SNAP_DESTROY_V2, ctypes.addressof(buffer))


def sync(fd: int) -> None:
    """Commit the running transaction and wake the kernel's cleaner. Raises OSError."""
    fcntl.ioctl(fd, IOC_SYNC)


def trim(fd: int, start: int = 0, length: int = (1 << 64) - 1) -> int:
    """FITRIM over a logical range, and always over all that is unallocated; bytes discarded as the kernel counts.

    Raises OSError.
    """
    buffer = bytearray(_FSTRIM_RANGE.pack(start, length, 0))
    fcntl.ioctl(fd, FITRIM, buffer)
    return int(_FSTRIM_RANGE.unpack(buffer)[1])
