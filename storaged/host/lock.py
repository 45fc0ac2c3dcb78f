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

    Raises ConfigError, with the holder's process id, when another process holds it. A directory that cannot be
    written takes no journal either, so there is nothing to protect: a warning, and no lock.
    """
    path = os.path.join(directory, NAME)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        log.warning("no lock in state directory %s: %s; resizes cannot be started", directory, error.strerror)
        yield
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            raise ConfigError(
                f"resize.state_dir = {directory!r} is in use by another storaged-host (process {holder or 'unknown'}): "
                "stop it, or choose another directory"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the message above will not know who holds it
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(fd)
