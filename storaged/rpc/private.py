"""Directories for sockets between our own parts, and the clearing of those that a killed process left."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re

log = logging.getLogger(__name__)
_NAME = re.compile(r"storaged-(\d{1,9})-[a-z0-9_]{8}")
"""The owner's process id, and what mkdtemp makes up."""


class PrivateDirectory:
    """A directory only we may enter, for a socket between our own parts. Its owner is in its name, and locks it."""

    def __init__(self, parent: str | None = None) -> None:
        import tempfile

        self.path = tempfile.mkdtemp(prefix=f"storaged-{os.getpid()}-", dir=parent or _parent())  # 0700
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def socket(self, name: str) -> str:
        """The path of a socket in it."""
        return os.path.join(self.path, name)

    def remove(self) -> None:
        """Take it away with all that is in it."""
        import shutil

        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep(parent: str | None = None) -> list[str]:
    """Clear what killed processes of this user left; the paths."""
    import shutil

    cleared = []
    with contextlib.suppress(OSError), os.scandir(parent or _parent()) as entries:
        for entry in entries:
            owner = _NAME.fullmatch(entry.name)
            if owner is not None and not _lives(int(owner[1])) and _abandoned(entry):
                shutil.rmtree(entry.path, ignore_errors=True)
                cleared.append(entry.path)
    for path in cleared:
        log.info("cleared %s, which a killed process left", path)
    return cleared


def _parent() -> str:
    where = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if where:
        return where
    if os.access("/run", os.W_OK):
        return "/run"
    import tempfile

    return tempfile.gettempdir()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _abandoned(entry: os.DirEntry[str]) -> bool:
    """True when it is ours and nobody holds its lock: a process in another container is not seen by its id."""
    try:
        if not entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
            return False
        fd = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
