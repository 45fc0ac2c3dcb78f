"""Where active swap files lie: the kernel moves no block group that holds one (fs/btrfs, btrfs_swap_activate)."""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Iterator

import btrfs

from storaged.btrfs import ioctl

PROC_SWAPS = "/proc/swaps"
_FIEMAP = struct.Struct("=QQIIII")  # fm_start, fm_length, fm_flags, fm_mapped_extents, fm_extent_count, reserved
_EXTENT = struct.Struct("=QQQ32x")  # fe_logical, fe_physical, fe_length; reserved, flags, reserved
FS_IOC_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap)
_AT_ONCE = 256


def swap_files(text: str) -> list[str]:
    """The paths of the files among what /proc/swaps lists; blanks and the like are written as octal numbers there."""
    lines = [line.split() for line in text.splitlines()[1:]]
    return [
        re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), words[0])
        for words in lines
        if len(words) > 1 and words[1] == "file"
    ]


def pinned_ranges(fsid: str) -> list[tuple[int, int]]:
    """(logical start, length) of every extent of active swap files on the filesystem `fsid`."""
    try:
        with open(PROC_SWAPS, encoding="utf-8", errors="surrogateescape") as file:
            paths = swap_files(file.read())
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for path in paths:
        try:
            with btrfs.FileSystem(os.path.dirname(path)) as place:
                if str(place.fs_info().fsid) != fsid:
                    continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # of another kind of filesystem, or in another mount namespace
        try:
            found += _extents(fd)
        finally:
            os.close(fd)
    return found


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """FIEMAP, whose "physical" is btrfs' logical address."""
    at = 0
    while True:
        buffer = ctypes.create_string_buffer(
            _FIEMAP.pack(at, (1 << 64) - 1 - at, 0, 0, _AT_ONCE, 0), _FIEMAP.size + _AT_ONCE * _EXTENT.size
        )
        ioctl.call(fd, FS_IOC_FIEMAP, ctypes.addressof(buffer))
        count = _FIEMAP.unpack_from(buffer)[3]
        for index in range(count):
            logical, physical, length = _EXTENT.unpack_from(buffer, _FIEMAP.size + index * _EXTENT.size)
            yield physical, length
            at = logical + length
        if count < _AT_ONCE:
            return
