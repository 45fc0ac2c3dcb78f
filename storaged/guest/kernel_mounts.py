"""mount(2) and its neighbours on this machine's kernel, behind `guest.mounts`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import subprocess
from functools import cache

from storaged.errors import StoragedError

MNT_DETACH = 2  # include/linux/fs.h
HOST_CID = 2
EDGE = 1 << 20
"""Every filesystem, volume manager and partition table has a mark in the first or the last MiB of its device."""
BTRFS_MIRRORS = (64 << 20, 256 << 30)
"""Where a btrfs whose first superblock was lost still has the others (fs/btrfs/disk-io.h)."""
BLOCK = 4096
DIRECTORY_MODE = 0o755


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    text = ctypes.c_char_p
    libc.mount.argtypes = [text, text, text, ctypes.c_ulong, text]
    libc.umount2.argtypes = [text, ctypes.c_int]
    return libc


def _checked(result: int, path: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


class KernelMounts:
    """This kernel, in the mount namespace of the calling thread."""

    def mount(self, source: str, target: str, fstype: str, flags: int, options: str) -> None:
        # fstype and options are NULL when empty: what a bind mount or a remount has no use for.
        data = options.encode() if options else None
        kind = fstype.encode() if fstype else None
        _checked(_libc().mount(source.encode(), target.encode(), kind, flags, data), target)

    def unmount(self, target: str) -> None:
        _checked(_libc().umount2(target.encode(), MNT_DETACH), target)

    def make_directories(self, path: str) -> list[str]:
        made: list[str] = []
        here = ""
        try:
            for part in path.strip("/").split("/"):
                here += f"/{part}"
                with contextlib.suppress(FileExistsError):
                    os.mkdir(here)
                    made.append(here)
                    os.chmod(here, DIRECTORY_MODE)  # whatever the umask is
        except OSError:
            self.remove_directories(made)
            raise
        return made

    def remove_directories(self, paths: list[str]) -> None:
        for path in reversed(paths):
            with contextlib.suppress(OSError):
                os.rmdir(path)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def contents(self, device: str) -> str:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISBLK(os.fstat(fd).st_mode):
                return "it is no block device"
            size = os.lseek(fd, 0, os.SEEK_END)
            if not size:
                return "it has no size"
            for start, length in ((0, EDGE), (max(size - EDGE, 0), EDGE), *((at, BLOCK) for at in BTRFS_MIRRORS)):
                found = os.pread(fd, length, start)
                if found.strip(b"\0"):
                    return f"there is data at byte {start + len(found) - len(found.lstrip(bytes(1)))}"
        finally:
            os.close(fd)
        return ""

    def make_btrfs(self, device: str) -> None:
        # Without -f: mkfs looks for itself once more, and refuses.
        _run("mkfs.btrfs", "-q", device)

    def mounted(self, target: str) -> str:
        found = ""
        with open("/proc/thread-self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                if _unescaped(before.split()[4]) == target:
                    found = _unescaped(after.split()[1])
        return found

    def grow(self, mountpoint: str) -> None:
        _run("btrfs", "filesystem", "resize", "max", mountpoint)

    def free(self, mountpoint: str) -> int:
        found = os.statvfs(mountpoint)
        return found.f_bavail * found.f_frsize

    def same_device(self, one: str, other: str) -> bool:
        try:
            found = [os.stat(path) for path in (one, other)]
        except OSError:
            return False
        return all(stat.S_ISBLK(it.st_mode) for it in found) and found[0].st_rdev == found[1].st_rdev

    def connect_host(self, port: int, within_s: float) -> int:
        host = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            host.settimeout(within_s)  # which leaves it non-blocking, as the kernel's 9p client wants it
            host.connect((HOST_CID, port))
            return host.detach()
        except OSError:
            host.close()
            raise

    def close(self, fd: int) -> None:
        os.close(fd)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise StoragedError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise StoragedError(f"{command[0]}: {done.stderr.strip() or f'exit status {done.returncode}'}")


def _unescaped(text: str) -> str:
    # Space, tab, newline and backslash are written in octal (proc_pid_mountinfo(5)).
    for code in ("040", "011", "012", "134"):
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text
