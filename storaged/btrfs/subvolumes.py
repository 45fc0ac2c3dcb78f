"""Subvolumes by their ids: which there are, and where they lie."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import btrfs
import btrfsutil

from storaged.btrfs import search
from storaged.btrfs.private_mount import TOP_LEVEL

ROOT_TREE = 1
ROOT_BACKREF = 144
FIRST, LAST = 256, (1 << 64) - 257  # BTRFS_FIRST_FREE_OBJECTID, BTRFS_LAST_FREE_OBJECTID
ROOT_INODE = FIRST
"""The inode of every subvolume's root directory."""
EMPTY_INODE = 2
"""BTRFS_EMPTY_SUBVOL_DIR_OBJECTID: what a snapshot shows where a nested subvolume was."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ROOT_REF = struct.Struct("<QQH")  # btrfs_root_ref: dirid, sequence, name_len; the name follows


@dataclass(frozen=True, slots=True)
class Entry:
    """A subvolume, and the directory entry that it has: in the subvolume `parent`, in its directory `directory`."""

    root_id: int
    parent: int
    directory: int
    name: str


def named(fd: int, pattern: re.Pattern[str]) -> Iterator[Entry]:
    """Every subvolume of the filesystem whose own name matches. Raises OSError."""
    for child, _, parent, data in search.items(fd, ROOT_TREE, FIRST, LAST, (ROOT_BACKREF, ROOT_BACKREF)):
        directory, _, length = _ROOT_REF.unpack_from(data)
        name = os.fsdecode(data[_ROOT_REF.size : _ROOT_REF.size + length])
        if pattern.fullmatch(name):
            yield Entry(child, parent, directory, name)


def root_id(fd: int) -> int:
    """The id of the subvolume that `fd` is in. Raises OSError."""
    try:
        return int(btrfsutil.subvolume_id(fd))
    except btrfsutil.BtrfsUtilError as error:
        raise OSError(error.errno, str(error)) from error


def is_root(fd: int) -> bool:
    """True for the root directory of a btrfs subvolume."""
    return bool(btrfsutil.is_subvolume(fd))


def protected(fd: int) -> bool:
    """True for a read-only subvolume, a snapshot, and one that was received: none is the work of a daemon."""
    try:
        info = btrfsutil.subvolume_info(fd)
        return bool(btrfsutil.get_subvolume_read_only(fd)) or any(info.parent_uuid) or any(info.received_uuid)
    except btrfsutil.BtrfsUtilError as error:
        raise OSError(error.errno, str(error)) from error


def path(top: int, parent: int, directory: int) -> str:
    """The path of an inode that is a directory, below the top-level subvolume. Raises OSError."""
    parts = []
    if parent != TOP_LEVEL:
        try:
            parts.append(str(btrfsutil.subvolume_path(top, parent)))
        except btrfsutil.BtrfsUtilError as error:
            raise OSError(error.errno, str(error)) from error
    if directory != ROOT_INODE:
        parts.append(os.fsdecode(btrfs.ioctl.ino_lookup(top, parent, directory).name_bytes.rstrip(b"/")))
    return "/".join(parts)


def walk(top: int, where: str) -> int:
    """A descriptor of the directory `where` below `top`; no symbolic link is followed. Raises OSError."""
    fd = os.open(".", _DIRECTORY, dir_fd=top)
    for name in where.split("/") if where else ():
        try:
            deeper = os.open(name, _DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = deeper
    return fd
