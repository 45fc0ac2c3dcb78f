"""Files beneath a root that no symbolic link leads out of, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from storaged.errors import StoragedError

SYS_OPENAT2 = 437
"""The same number on every architecture; Linux 5.6."""
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_BENEATH = 0x08
"""A link that leads outside fails with EXDEV."""
RESOLVE_IN_ROOT = 0x10
"""The directory is `/` for every link, as in a chroot."""
_ATTEMPTS = 8


class _How(ctypes.Structure):
    """struct open_how (openat2(2))."""

    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """A descriptor of `path`, which is taken to be relative to `directory`. Raises OSError."""
    how = _How(flags | os.O_CLOEXEC, 0, resolve | RESOLVE_NO_MAGICLINKS)
    number = 0
    for _ in range(_ATTEMPTS):
        fd: int = _libc().syscall(
            ctypes.c_long(SYS_OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        number = ctypes.get_errno()
        if fd >= 0:
            return fd
        if number not in (errno.EAGAIN, errno.EINTR):  # EAGAIN: something was renamed on the way
            break
    raise OSError(number, os.strerror(number), path)


@contextmanager
def opened(root: str, path: str, flags: int) -> Iterator[int]:
    """A descriptor of `path`, as a process finds it whose root directory is `root`."""
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = openat2(top, path, flags, RESOLVE_IN_ROOT)
    finally:
        os.close(top)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def directory_of(root: str, path: str) -> Iterator[tuple[int, str]]:
    """The directory that `path` beneath `root` is in, and its name there."""
    parent, name = os.path.split(path)
    with opened(root, parent, os.O_RDONLY | os.O_DIRECTORY) as directory:
        yield directory, name


def replace_file(directory: int, name: str, content: bytes, mode: int) -> None:
    """Put a new file in the place of `name`; who reads meanwhile sees the old one or the new one."""

    def make(temporary: str) -> None:
        fd = os.open(
            temporary,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
            dir_fd=directory,
        )
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask is
            file.write(content)
            file.flush()
            os.fsync(fd)

    _replace(directory, name, make)


def replace_link(directory: int, name: str, target: str) -> None:
    """Put a symbolic link in the place of `name`."""
    _replace(directory, name, lambda temporary: os.symlink(target, temporary, dir_fd=directory))


def _replace(directory: int, name: str, make: Callable[[str], None]) -> None:
    prefix = f".{name}.storaged-"
    for entry in os.listdir(directory):
        if entry.startswith(prefix):  # of a run that was killed
            with contextlib.suppress(OSError):
                os.unlink(entry, dir_fd=directory)
    temporary = prefix + os.urandom(8).hex()
    try:
        make(temporary)
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise
    os.fsync(directory)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns an OSError into a StoragedError that names what was tried."""
    try:
        yield
    except OSError as error:
        raise StoragedError(f"{what}: {os.strerror(error.errno or 0)}") from error


def is_plain_path(path: str) -> bool:
    """True for an absolute path with a name at its end, and nothing in it that could lead elsewhere."""
    parts = path.split("/")
    return parts[0] == "" and len(parts) > 1 and not any(part in ("", ".", "..") or "\0" in part for part in parts[1:])
