"""A mount table, directories and devices in memory, with the errors that a kernel gives."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

from storaged.errors import StoragedError

MS_REMOUNT = 32  # include/uapi/linux/mount.h
MS_BIND = 4096
_VIRTUAL = {"tmpfs"}
_ON_DEVICES = {"btrfs", "ext4"}


def _refuse(number: int, path: str = "") -> OSError:
    return OSError(number, os.strerror(number), path)


@dataclass
class SimMounts:
    """Nothing on this machine is mounted, made or formatted."""

    directories: dict[str, int] = field(default_factory=lambda: {"/": 0o755, "/mnt": 0o755})
    """Path → mode."""
    devices: dict[str, str] = field(default_factory=lambda: {"/dev/vdb": ""})
    """Path → what is on it: a filesystem, `damaged btrfs`, anything else, or nothing."""
    table: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(source, target, fstype, options), in the order in which they were mounted."""
    ports: set[int] = field(default_factory=set)
    """Where the host serves 9p."""
    open_fds: set[int] = field(default_factory=set)
    read_only: bool = False
    """When true, mkdir and chmod are refused."""
    grown: list[str] = field(default_factory=list)
    """Mountpoints that were grown, once for each time."""

    def mount(self, source: str, target: str, fstype: str, flags: int, options: str) -> None:
        if target not in self.directories:
            raise _refuse(errno.ENOENT, target)
        if flags & MS_REMOUNT:
            if not self.mounted(target):
                raise _refuse(errno.EINVAL, target)
            return
        if flags & MS_BIND:
            if source not in self.directories:
                raise _refuse(errno.ENOENT, source)
        elif fstype in _ON_DEVICES:
            if source not in self.devices:
                raise _refuse(errno.ENOENT, source)
            found = self.devices[source]
            recovers = f"damaged {fstype}" == found and "usebackuproot" in options
            if found != fstype and not recovers:
                raise _refuse(errno.EIO if found.startswith("damaged") else errno.EINVAL, source)
        elif fstype not in _VIRTUAL and (fstype != "9p" or not self.open_fds):
            raise _refuse(errno.ENODEV, fstype)
        self.table.append((source, target, fstype, options))

    def unmount(self, target: str) -> None:
        for row in reversed(self.table):
            if row[1] == target:
                self.table.remove(row)
                return
        raise _refuse(errno.EINVAL, target)

    def make_directories(self, path: str) -> list[str]:
        made: list[str] = []
        here = ""
        for part in path.strip("/").split("/"):
            here += f"/{part}"
            if here not in self.directories:
                if self.read_only:
                    raise _refuse(errno.EROFS, here)
                self.directories[here] = 0o755
                made.append(here)
        return made

    def remove_directories(self, paths: list[str]) -> None:
        for path in paths:
            self.directories.pop(path, None)

    def chmod(self, path: str, mode: int) -> None:
        if self.read_only:
            raise _refuse(errno.EROFS, path)
        self.directories[path] = mode

    def contents(self, device: str) -> str:
        if device not in self.devices:
            raise _refuse(errno.ENOENT, device)
        return self.devices[device]

    def make_btrfs(self, device: str) -> None:
        if self.devices[device]:
            raise StoragedError("mkfs.btrfs: it is not blank")
        self.devices[device] = "btrfs"

    def mounted(self, target: str) -> str:
        return next((row[0] for row in reversed(self.table) if row[1] == target), "")

    def grow(self, mountpoint: str) -> None:
        self.grown.append(mountpoint)

    def free(self, mountpoint: str) -> int:  # noqa: ARG002  # all of them are alike
        return 8 << 30

    def same_device(self, one: str, other: str) -> bool:
        return one == other and one in self.devices

    def connect_host(self, port: int, within_s: float) -> int:  # noqa: ARG002  # nothing takes time here
        if port not in self.ports:
            raise _refuse(errno.ECONNREFUSED)
        fd = 1000 + port
        self.open_fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.open_fds.discard(fd)
