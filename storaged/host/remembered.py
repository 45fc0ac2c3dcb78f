"""What each guest may have been granted, as a restart of this process must know it.

A guest that was told a grant keeps to it, whether this process lives or not. Before a grant goes out, the size that it
lets the image grow to is written down, so that a process that is killed and started again sets as much aside for
guests that do not answer it. The file is not synced: a host that crashes takes its guests with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

log = logging.getLogger(__name__)

MOST = 256 << 10
"""Bytes of the file above which it is written anew with what stands now."""


class Remembered:
    """The file at `path`: `NAME BYTES` a line, the last one of a name counts. Used by one thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._now: dict[str, int] = {}
        self._size = 0
        self._fd = -1
        self._failed = ""

    def load(self) -> Mapping[str, int]:
        """By guest, the bytes that its image may have been let grow to; what cannot be read is left out."""
        try:
            with open(self._path, "rb", opener=_opener) as file:
                raw = file.read(16 * MOST)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("%s: %s; what guests were granted before is not known", self._path, error.strerror)
            return {}
        found = {}
        for line in raw.split(b"\n")[:-1]:  # what follows the last one was never finished
            name, _, number = line.decode("ascii", "replace").partition(" ")
            if name and number.isascii() and number.isdigit() and len(number) < 20:
                found[name] = int(number)
        return {name: size for name, size in found.items() if size}

    def of(self, guest: str) -> int:
        """What is written down of it."""
        return self._now.get(guest, 0)

    def note(self, sizes: Mapping[str, int]) -> bool:
        """Write down what has changed; False, with a warning, when that cannot be."""
        new = {name: size for name, size in sizes.items() if self._now.get(name) != size}
        if not new:
            return True
        try:
            if self._fd < 0 or self._size > MOST:
                self._begin({**self._now, **new})
            else:
                self._append(new)
        except OSError as error:
            if self._failed != str(error):
                log.warning("what guests are granted cannot be written down, so they get no more: %s", error)
            self._failed = str(error)
            return False
        if self._failed:
            log.info("what guests are granted is written down again")
        self._failed = ""
        self._now.update(new)
        return True

    def _begin(self, sizes: Mapping[str, int]) -> None:
        """Write the file anew: it is the old one or the new one, never half."""
        self.close()
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        new = f"{self._path}.new"
        self._fd = os.open(
            new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        self._size = 0
        self._append({name: size for name, size in sizes.items() if size})
        os.replace(new, self._path)

    def _append(self, sizes: Mapping[str, int]) -> None:
        data = b"".join(b"%s %d\n" % (name.encode("ascii"), size) for name, size in sizes.items())
        if os.write(self._fd, data) < len(data):
            self.close()  # half a line: the next time all of it is written anew
            raise OSError(f"{self._path}: no room")
        self._size += len(data)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _opener(path: str, flags: int) -> int:
    """No FIFO keeps us waiting."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
