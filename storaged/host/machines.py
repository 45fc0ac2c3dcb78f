"""Whether a guest's machine runs: its process does. Silence never says that it has ended, nor does a missing file."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import stat
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)

REUSED_S = 60.0
"""A process that started this long after its PID file was written is another one that has the number now.

Generous: the two times come from different clocks, and to take a running machine for an ended one is the worse error.
"""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Named:
    """What a PID file says: `pid`, None when that is no number; the file itself, and when it was written (epoch)."""

    pid: int | None
    file: tuple[int, int, int]
    written: float


class Machine:
    """A machine by its PID file (QEMU's -pidfile); without one it always counts as running.

    The file is read once, when the machine starts, and a pidfd of its process is kept (pidfd_open(2), Linux 5.3):
    what happens to the file afterwards says nothing. Only when the process has ended the file is read again.
    `reason`: why the last answer of `runs` was what it was. Used by one thread; `close` ends it.
    """

    def __init__(self, pid_file: str) -> None:
        self.reason = "" if pid_file else "it has no PID file"
        self._pid_file = pid_file
        self._pid = 0
        self._pidfd: int | None = None
        self._spent: tuple[int, int, int] | None = None
        self._file: tuple[int, int, int] | None = None
        self._unknown = False

    def runs(self) -> bool:
        """True while its process lives, and when that cannot be known.

        False once after each end, also when the next machine runs already: that one is found by the next call.
        """
        if not self._pid_file:
            return True
        if self._pidfd is not None:
            if not _ended(self._pidfd):
                return True
            self.close()
            self._spent, self.reason = self._file, f"pid {self._pid} exited"
            return False
        return self._found()

    def announced(self) -> None:
        """Its agent has called: it runs, whatever the PID file says, until that names a process."""
        if self._pid_file and self._pidfd is None and not self._found():
            self._unknown = True
            self.reason = f"it announced itself; {self.reason}"

    def close(self) -> None:
        """Let go of the process."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _found(self) -> bool:
        """Look for a machine in the PID file."""
        try:
            named = _read(self._pid_file)
        except FileNotFoundError:
            return self._is_unknown()
        except OSError as error:
            return self._unknowable(error.strerror or "cannot be read")
        if named.pid is None:
            return self._unknowable("holds no process id")
        if named.file == self._spent:
            return self._unknown  # it names the process that has ended
        try:
            pidfd = os.pidfd_open(named.pid)
        except OSError as error:
            if error.errno == errno.ESRCH:
                self._unknown, self.reason = False, f"pid {named.pid} does not exist"
                return False
            return self._unknowable(f"names {named.pid}: {error.strerror}")
        started = _started(named.pid)
        reused = started is not None and started > named.written + REUSED_S
        if reused or _ended(pidfd):
            os.close(pidfd)
            self._unknown, self.reason = (
                False,
                f"pid {named.pid} is another process" if reused else f"pid {named.pid} exited",
            )
            if reused and self._spent != named.file:
                log.warning(
                    "PID file %s is stale: process %d started %.0f s after it was written",
                    self._pid_file, named.pid, (started or 0.0) - named.written,
                )  # fmt: skip
                self._spent = named.file
            return False
        self._pidfd, self._pid, self._file, self._unknown = pidfd, named.pid, named.file, False
        self.reason = f"pid {named.pid}"
        return True

    def _unknowable(self, why: str) -> bool:
        """The file is there and says nothing: a machine counts as running unless the last one was seen to end."""
        if self._spent is not None and not self._unknown:
            return False
        if not self._unknown:
            log.warning("PID file %s %s: its machine counts as running", self._pid_file, why)
        self._unknown, self.reason = True, f"PID file {self._pid_file} {why}"
        return True

    def _is_unknown(self) -> bool:
        """The file is not there: nothing runs, unless something was taken for running whose process is not known."""
        known = "" if not self._unknown else ", and its process was never known"
        self.reason = f"PID file {self._pid_file} does not exist{known}"
        return self._unknown


def _read(path: str) -> _Named:
    """Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not keep us waiting
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        text = file.read(32)
    pid = None
    with contextlib.suppress(ValueError):
        pid = int(text)
    # No number of a process: kill(2) and pidfd_open(2) would take another meaning or fail.
    pid = pid if pid is not None and 0 < pid < 1 << 31 else None
    return _Named(pid, (status.st_dev, status.st_ino, status.st_mtime_ns), status.st_mtime)


def _ended(pidfd: int) -> bool:
    """A pidfd is readable once its process has ended, be it waited for or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _started(pid: int) -> float | None:
    """When it started, seconds since the epoch by today's clock (proc(5), stat: starttime); None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            after_name = file.read().rpartition(b")")[2].split()
        ticks = int(after_name[19])
    except (OSError, ValueError, IndexError):
        return None
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / _TICKS
