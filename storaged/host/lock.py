"""One controller per state directory: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

from storaged.errors import ConfigError

log = logging.getLogger(__name__)

NAME = "lock"


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Hold the lock of the state directory (flock(2) on the file `lock` in it), which is created if need be.

    Raises ConfigError, with the holder's process id, when another process holds it, and without such a directory.
    One that cannot be written (full, read-only) is locked itself: sharing goes on, with a warning.
    """
    path = os.path.join(directory, NAME)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        whole = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"resize.state_dir = {directory!r} cannot be used: {error.strerror}") from error
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        log.warning(
            "state directory %s cannot be written: %s; guests get no more than they have, and no resize can be started",
            directory, error.strerror,
        )  # fmt: skip
        fd = -1
    try:
        try:
            # Both, so that one that could write the directory and one that cannot meet.
            fcntl.flock(whole, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fd >= 0:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (os.pread(fd, 32, 0) if fd >= 0 else b"").decode("ascii", "replace").strip()
            raise ConfigError(
                f"resize.state_dir = {directory!r} is in use by another storaged-host (process {holder or 'unknown'}): "
                "stop it, or choose another directory"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the message above will not know who holds it
            if fd >= 0:
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(whole)
        if fd >= 0:
            os.close(fd)
