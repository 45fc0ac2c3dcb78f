"""Tree search for bulk reading: keys only where keys are enough, in a fraction of the time of one object an item.

BTRFS_IOC_TREE_SEARCH_V2 (since Linux 3.14) and the items of fs/btrfs: EXTENT_ITEM in the extent tree, and the free
space tree (Documentation/filesystems, "space_cache=v2"), which is true after every commit.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

from storaged.btrfs import ioctl

IOC_TREE_SEARCH_V2 = 0xC0709411  # _IOWR(0x94, 17, struct btrfs_ioctl_search_args_v2)
EXTENT_TREE, FREE_SPACE_TREE = 2, 10
EXTENT_DATA, EXTENT_ITEM = 108, 168
INLINE = 0  # BTRFS_FILE_EXTENT_INLINE
FREE_SPACE_EXTENT, FREE_SPACE_BITMAP = 199, 200
SECTOR = 4096

_KEY = struct.Struct("=7Q4L4Q")  # btrfs_ioctl_search_key
_BUFFER_SIZE = struct.Struct("=Q")
_HEADER = struct.Struct("=QQQLL")  # btrfs_ioctl_search_header: transid, objectid, offset, type, length
_FILE_EXTENT = struct.Struct("=20xBQQ")  # btrfs_file_extent_item: ..., type, disk_bytenr, disk_num_bytes
_BUFFER = 1 << 18
_NO_LIMIT = (1 << 64) - 1


def items(fd: int, tree: int, first: int, last: int, kinds: tuple[int, int]) -> Iterator[tuple[int, int, int, bytes]]:
    """(objectid, type, offset, data) of every item whose objectid and type lie in the ranges. Raises OSError."""
    low = (first, kinds[0], 0)
    head = _KEY.size + _BUFFER_SIZE.size
    buffer = ctypes.create_string_buffer(head + _BUFFER)
    address = ctypes.addressof(buffer)
    view = memoryview(buffer)
    while True:
        _KEY.pack_into(
            buffer, 0, tree, low[0], last, low[2], _NO_LIMIT, 0, _NO_LIMIT, low[1], kinds[1], 0xFFFFFFFF, 0, 0, 0, 0, 0
        )
        _BUFFER_SIZE.pack_into(buffer, _KEY.size, _BUFFER)
        ioctl.call(fd, IOC_TREE_SEARCH_V2, address)
        count = _KEY.unpack_from(buffer)[9]
        if not count:
            return
        at = head
        for _ in range(count):
            _, objectid, offset, kind, length = _HEADER.unpack_from(buffer, at)
            at += _HEADER.size
            # The kernel compares whole keys, so other types come along in between.
            if kinds[0] <= kind <= kinds[1]:
                yield objectid, kind, offset, bytes(view[at : at + length])
            low = (objectid, kind, offset)
            at += length
        low = (low[0], low[1], low[2] + 1) if low[2] < _NO_LIMIT else (low[0], low[1] + 1, 0)


def data_extents(fd: int, start: int, length: int) -> Iterator[tuple[int, int]]:
    """(logical start, length) of every data extent that begins in the range."""
    for objectid, _, offset, _ in items(fd, EXTENT_TREE, start, start + length - 1, (EXTENT_ITEM, EXTENT_ITEM)):
        yield objectid, offset


def file_extents(fd: int, subvolume: int, first: int, last: int) -> list[tuple[int, int, int, int]]:
    """(inode, offset in the file, logical start, length) of every extent of the files `first` to `last`.

    Each as it lies on the disk. FIEMAP does not do: it joins neighbours, and an extent is freed only as a whole.
    """
    found = []
    for inode, _, offset, data in items(fd, subvolume, first, last, (EXTENT_DATA, EXTENT_DATA)):
        kind, address, length = _FILE_EXTENT.unpack_from(data)
        if kind != INLINE and address:
            found.append((inode, offset, address, length))
    return found


def free_extents(fd: int) -> Iterator[tuple[int, int]]:
    """(logical start, length) of every piece of free room, as of the last commit.

    Yields nothing when the filesystem has no free space tree.
    """
    try:
        for objectid, kind, offset, data in items(
            fd, FREE_SPACE_TREE, 0, _NO_LIMIT, (FREE_SPACE_EXTENT, FREE_SPACE_BITMAP)
        ):
            if kind == FREE_SPACE_EXTENT:
                yield objectid, offset
            else:
                yield from _runs(objectid, data)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise OSError(error.errno, os.strerror(error.errno or 0)) from error


def _runs(start: int, bitmap: bytes) -> Iterator[tuple[int, int]]:
    """Runs of set bits, a sector each; runs that touch the next bitmap are not joined, which is on the safe side."""
    bits = int.from_bytes(bitmap, "little")
    at = 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        bits >>= zeros
        at += zeros
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield start + at * SECTOR, ones * SECTOR
        bits >>= ones
        at += ones
