"""Who is who on this host: two names of one image or one agent are found by device and inode, not by spelling.

An image that two guests share would be counted twice and written by both; one outside its pool would be promised
room that the pool does not have.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storaged.addresses import GuestAddress, HybridAddress, TcpAddress, UnixAddress
from storaged.errors import ConfigError
from storaged.host.config import GuestConfig, PoolConfig

_LIBC = ctypes.CDLL(None, use_errno=True)
_HANDLE = struct.Struct("<Ii")
"""struct file_handle (name_to_handle_at(2), Linux 2.6.39): handle_bytes, handle_type; the handle itself follows."""
_HANDLE_MOST = 128
"""MAX_HANDLE_SZ (linux/exportfs.h)."""
_AT_FDCWD, _AT_SYMLINK_FOLLOW = -100, 0x400
_BTRFS_FS_INFO, _FS_INFO_LENGTH, _FSID = 0x8400941F, 1024, slice(16, 32)
"""BTRFS_IOC_FS_INFO, its struct's size, and where the filesystem's UUID is in it (linux/btrfs.h, Linux 2.6.39)."""


@dataclass(frozen=True, slots=True)
class FileId:
    """One file. `handle` tells it from a later one that was given the same inode; empty where that is not known."""

    device: int
    inode: int
    handle: bytes = b""

    def __str__(self) -> str:
        return f"device {device_name(self.device)}, inode {self.inode}"


def device_name(device: int) -> str:
    """`8:1`, as lsblk and /proc/self/mountinfo write it."""
    return f"{os.major(device)}:{os.minor(device)}"


def file_id(path: str, handle: bytes | None = None) -> FileId:
    """The file at `path`, symbolic links followed; with its `handle` where that is known already. Raises OSError."""
    status = os.stat(path)
    return FileId(status.st_dev, status.st_ino, _handle(path) if handle is None else handle)


def _handle(path: str) -> bytes:
    """The file's handle with its generation; empty where the filesystem has none (overlayfs, FUSE)."""
    buffer = ctypes.create_string_buffer(_HANDLE.size + _HANDLE_MOST)
    _HANDLE.pack_into(buffer, 0, _HANDLE_MOST, 0)
    mount = ctypes.c_int()
    if _LIBC.name_to_handle_at(_AT_FDCWD, os.fsencode(path), buffer, ctypes.byref(mount), _AT_SYMLINK_FOLLOW):
        return b""
    length, _ = _HANDLE.unpack_from(buffer)
    return bytes(buffer.raw[: _HANDLE.size + length])


def check(pools: Sequence[PoolConfig], guests: Sequence[GuestConfig]) -> None:
    """Raises ConfigError for the first pool, or guest's image or agent, that cannot be its own."""
    for number, pool in enumerate(pools):
        if reason := _no_pool(pool, pools[:number]):
            raise ConfigError(reason)
    by_name = {pool.name: pool for pool in pools}
    for number, guest in enumerate(guests):
        if reason := why_not(guest, by_name[guest.pool], guests[:number]):
            raise ConfigError(reason)


def _no_pool(pool: PoolConfig, others: Iterable[PoolConfig]) -> str:
    """Why `pool` cannot be shared beside `others`: what is free there would be promised twice. Blocks."""
    what = f"pool.{pool.name}.path = {pool.path!r}"
    try:
        if not stat.S_ISDIR(os.stat(pool.path).st_mode):
            return f"{what} is no directory: where a filesystem is mounted is expected"
        for other in others:
            if _on_one_filesystem(pool.path, other.path):
                return f"{what} is on the filesystem of pool.{other.name}.path = {other.path!r}: one pool shares it"
            if pool.thin_pool and pool.thin_pool == other.thin_pool:
                return (
                    f"pool.{pool.name}.thin_pool = {pool.thin_pool!r} is that of pool.{other.name}: one pool shares it"
                )
    except OSError as error:
        return f"{what}: {error.strerror}"
    return ""


def why_not(guest: GuestConfig, pool: PoolConfig, others: Iterable[GuestConfig]) -> str:
    """Why `guest` cannot be served beside `others`, naming the keys; empty when it can. Blocks."""
    what = f"guest.{guest.name}.image = {guest.image!r}"
    try:
        status = os.stat(guest.image)
        inside = _on_one_filesystem(guest.image, pool.path)
    except OSError as error:
        return f"{what}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        return f"{what} is {kind}: a regular file is expected"
    if not inside:
        return f"{what} is not on the filesystem of pool.{pool.name}.path = {pool.path!r}: move it, or name its pool"
    image, agent = _place(guest.image), _agent(guest.address)
    for other in others:
        if _place(other.image) == image:
            return (
                f"{what} is the same file as guest.{other.name}.image = {other.image!r} "
                f"({FileId(status.st_dev, status.st_ino)}): every guest needs its own"
            )
        if _agent(other.address) == agent:
            return (
                f"guest.{guest.name}.address = '{guest.address}' is the same agent as "
                f"guest.{other.name}.address = '{other.address}': every guest has its own"
            )
    return ""


def _place(path: str) -> tuple[int, int] | str:
    """Device and inode; of what is not there, its path without links and detours."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _agent(address: GuestAddress) -> object:
    """Equal for two spellings of one agent. Names of hosts are not looked up."""
    match address:
        case UnixAddress(path):
            return _place(path)
        case HybridAddress(path, port):
            return _place(path), port
        case TcpAddress(host, port):
            return _host(host), port
    return str(address)


def _host(host: str) -> str:
    """One spelling of an address."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return host.lower()


def _on_one_filesystem(one: str, other: str) -> bool:
    """Whether both lie on one filesystem; subvolumes of a btrfs have a device number each. Raises OSError."""
    if os.stat(one).st_dev == os.stat(other).st_dev:
        return True
    first = btrfs(one)
    return bool(first) and first == btrfs(other)


def btrfs(path: str) -> bytes:
    """The UUID of the btrfs that `path` lies on; empty on another filesystem."""
    buffer = bytearray(_FS_INFO_LENGTH)
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _BTRFS_FS_INFO, buffer)
        finally:
            os.close(fd)
    return bytes(buffer[_FSID]).strip(b"\0")
