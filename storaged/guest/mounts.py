"""Mounts that a host asks for: what may be asked for, in which order it is done, what is undone when it fails."""

from __future__ import annotations

import asyncio
import errno
import logging
import posixpath
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from storaged.errors import InvalidRequest, StoragedError

log = logging.getLogger(__name__)

MS_NOSUID = 2  # include/uapi/linux/mount.h
MS_NODEV = 4
LONGEST_OPTIONS = 4095
"""mount(2) takes a page less a NUL and drops what is longer without a word."""
LONGEST_PATH = 4095
ANY_PORT = 0xFFFFFFFF
"""VMADDR_PORT_ANY (vsock(7))."""
HANDLED_ELSEWHERE = "/mnt/external/0"
"""Hosts ask for it though nothing is to be mounted there: it is answered as done."""
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class MountSettings:
    """How filesystems are mounted."""

    connect_s: float = field(
        default=10.0, metadata={"help": "Seconds that the host's 9p server has to take a connection."}
    )
    msize: int = field(default=65536, metadata={"help": "Bytes in one 9p message, at most."})


@dataclass(frozen=True, slots=True)
class Mount:
    """The arguments of mount(2), and what to do before and after."""

    source: str
    target: str
    fstype: str
    flags: int = 0
    options: str = ""
    create_target: bool = False
    permissions: int = 0
    mkfs_if_needed: bool = False


@dataclass(frozen=True, slots=True)
class Mount9P:
    """A directory of the host, served on its vsock port."""

    port: int
    target: str


def plain(name: str, text: str, most: int = LONGEST_PATH) -> str:
    """`text` without anything that no path, type or option has. Raises InvalidRequest."""
    if "\0" in text or "\n" in text:
        raise InvalidRequest(f"{name} {text!r} has a NUL byte or a newline")
    if len(text.encode()) > most:
        raise InvalidRequest(f"{name} has {len(text.encode())} bytes; at most {most} are accepted")
    return text


def absolute(name: str, text: str) -> str:
    """The path as text: absolute, no `..`, nothing doubled. Raises InvalidRequest."""
    plain(name, text)
    if not text.startswith("/"):
        raise InvalidRequest(f"{name} {text!r} is not an absolute path")
    if ".." in text.split("/"):
        raise InvalidRequest(f"{name} {text!r} has a .. in it")
    return "/" + posixpath.normpath(text).lstrip("/")


def check_mount(asked: Mount) -> Mount:
    """The same with a tidy target. Raises InvalidRequest."""
    target = absolute("target", asked.target)
    plain("source", asked.source)
    plain("fstype", asked.fstype)
    plain("options", asked.options, LONGEST_OPTIONS)
    if asked.permissions & ~0o7777:
        raise InvalidRequest(f"permissions {asked.permissions:#o}: at most 07777 is accepted")
    if asked.mkfs_if_needed:
        absolute("source", asked.source)
    return Mount(
        asked.source,
        target,
        asked.fstype,
        asked.flags,
        asked.options,
        asked.create_target,
        asked.permissions,
        asked.mkfs_if_needed,
    )


def check_9p(asked: Mount9P) -> Mount9P:
    """The same with a tidy target. Raises InvalidRequest."""
    if not 0 < asked.port < ANY_PORT:
        raise InvalidRequest(f"port {asked.port}: 1 to {ANY_PORT - 1} is accepted")
    return Mount9P(asked.port, absolute("target", asked.target))


def options_9p(fd: int, msize: int) -> str:
    """What the kernel's 9p client is told."""
    return f"trans=fd,rfdno={fd},wfdno={fd},cache=none,access=any,version=9p2000.L,msize={msize}"


class MountSystem(Protocol):
    """What mounts need of a kernel. Every call may block, and raises OSError when the kernel refuses."""

    def mount(self, source: str, target: str, fstype: str, flags: int, options: str) -> None: ...

    def unmount(self, target: str) -> None:
        """Take the topmost mount at `target` away, at once for whoever looks."""
        ...

    def make_directories(self, path: str) -> list[str]:
        """Make `path` and its parents with mode 0755; those that were not there before, outermost first."""
        ...

    def remove_directories(self, paths: list[str]) -> None:
        """Remove what `make_directories` made, where it is still empty. Raises nothing."""
        ...

    def chmod(self, path: str, mode: int) -> None: ...

    def contents(self, device: str) -> str:
        """What is on the block device, for a person; empty when it is blank."""
        ...

    def make_btrfs(self, device: str) -> None:
        """Format a blank device. StoragedError when the tool does not."""
        ...

    def mounted(self, target: str) -> str:
        """The source of the topmost mount at `target`; empty when it is no mountpoint."""
        ...

    def grow(self, mountpoint: str) -> None:
        """Make the btrfs there as large as its device. StoragedError when the tool does not."""
        ...

    def free(self, mountpoint: str) -> int:
        """Bytes that unprivileged programs can still write there."""
        ...

    def same_device(self, one: str, other: str) -> bool:
        """True when both paths lead to one device."""
        ...

    def connect_host(self, port: int, within_s: float) -> int:
        """A connected descriptor to the host's vsock port; the caller closes it."""
        ...

    def close(self, fd: int) -> None: ...


class Mounts:
    """Carries mounts out on threads of its own. One that was begun is done to its end, whoever gives up."""

    def __init__(
        self, system: MountSystem, settings: MountSettings | None = None, *, threads: ThreadPoolExecutor | None = None
    ) -> None:
        self.system = system
        self._settings = settings or MountSettings()
        self._threads = threads or ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="mount")

    @property
    def threads(self) -> ThreadPoolExecutor:
        """Where what blocks in the kernel is done."""
        return self._threads

    async def mount(self, asked: Mount) -> int:
        """0, or the errno with which the kernel refused. Raises InvalidRequest, StoragedError."""
        checked = check_mount(asked)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._mount, checked)

    async def mount_9p(self, asked: Mount9P) -> None:
        """Mount a directory of the host. Raises InvalidRequest, StoragedError."""
        checked = check_9p(asked)
        await asyncio.get_running_loop().run_in_executor(self._threads, self._mount_9p, checked)

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _mount(self, asked: Mount) -> int:
        if asked.target == HANDLED_ELSEWHERE:
            return 0
        made: list[str] = []
        try:
            if asked.create_target:
                made = self.system.make_directories(asked.target)
            self._mount_or_format(asked)
        except OSError as error:
            self.system.remove_directories(made)
            log.warning("mounting %s at %s: %s", asked.source, asked.target, error.strerror)
            return error.errno or errno.EIO
        if asked.permissions:
            try:
                self.system.chmod(asked.target, asked.permissions)
            except OSError as error:
                self.system.unmount(asked.target)
                self.system.remove_directories(made)
                raise StoragedError(
                    f"permissions {asked.permissions:#o} of {asked.target}: {error.strerror}; unmounted again"
                ) from error
        log.info("mounted %s at %s", asked.source or asked.fstype, asked.target)
        return 0

    def _mount_or_format(self, asked: Mount) -> None:
        arguments = (asked.source, asked.target, asked.fstype, asked.flags, asked.options)
        try:
            self.system.mount(*arguments)
        except OSError as error:
            if error.errno != errno.EINVAL or not asked.mkfs_if_needed or asked.fstype != "btrfs":
                raise
            if not format_blank(self.system, asked.source):
                raise
            self.system.mount(*arguments)

    def _mount_9p(self, asked: Mount9P) -> None:
        try:
            fd = self.system.connect_host(asked.port, self._settings.connect_s)
        except OSError as error:
            raise StoragedError(f"vsock port {asked.port} of the host: {error.strerror or error}") from error
        made: list[str] = []
        try:
            made = self.system.make_directories(asked.target)
            options = options_9p(fd, self._settings.msize)
            self.system.mount("none", asked.target, "9p", MS_NOSUID | MS_NODEV, options)
        except OSError as error:
            self.system.remove_directories(made)
            raise StoragedError(f"9p at {asked.target}: {error.strerror}") from error
        finally:
            self.system.close(fd)  # the kernel's client holds the connection by itself
        log.info("mounted the host's port %d at %s", asked.port, asked.target)


def format_blank(system: MountSystem, device: str) -> bool:
    """Make a btrfs on `device` if nothing is on it; False, and the reason in the log, when that was not done."""
    try:
        if found := system.contents(device):
            log.warning("%s is not formatted: %s", device, found)
            return False
        system.make_btrfs(device)
    except StoragedError as error:
        log.warning("%s could not be formatted: %s", device, error.message)
        return False
    except OSError as error:
        log.warning("%s is not formatted: %s", device, error.strerror)
        return False
    log.info("%s was blank and has a btrfs now", device)
    return True
