"""Asks a child process for the preallocated, unwritten extents that applications hold."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time

from storaged.btrfs import prealloc_worker
from storaged.core.model import Unwritten

MOST_OWED = 8
"""Requests that the child may be behind with; more are not sent."""
_READ = 4096


class PreallocScanner:
    """`core.ports.Preallocated` of the filesystem that `filesystem_fd` is open on. Needs CAP_SYS_ADMIN.

    The descriptor may be of any directory or subvolume of it, and stays the caller's.
    """

    def __init__(self, filesystem_fd: int) -> None:
        self._fd = filesystem_fd
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._forget()

    def _forget(self) -> None:
        self._last = Unwritten(0, known=False)
        self._received = b""
        self._owed = 0

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        child = self._child
        return child.pid if child is not None else None

    def start(self) -> None:
        """Start the child, and with it the first scan. A child that cannot be started is tried again by `look`."""
        with self._lock, contextlib.suppress(OSError):
            self._ensure()

    def look(self, balloon_root: int, patience_s: float) -> Unwritten:
        """What applications hold as of some moment during this call; not known when that takes too long."""
        deadline = time.monotonic() + patience_s
        if not self._lock.acquire(timeout=max(patience_s, 0)):
            return self._unknown()
        try:
            return self._ask(balloon_root, deadline)
        except (OSError, EOFError):  # it was killed
            self._reap()
            with contextlib.suppress(OSError):
                self._ensure()
            return self._unknown()
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the child, also during a scan. Afterwards `look` knows nothing."""
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()  # a look that waits for it ends
        with self._lock:
            self._reap()

    def _unknown(self) -> Unwritten:
        last = self._last
        return Unwritten(last.size, known=False, files=last.files, scanned=last.scanned)

    def _ensure(self) -> None:
        """Start the child unless it runs. Raises OSError."""
        if self._closed or (self._child is not None and self._child.poll() is None):
            return
        self._reap()
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", prealloc_worker.__file__, str(self._fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._fd,),
            start_new_session=True,
            env={},
        )

    def _ask(self, balloon_root: int, deadline: float) -> Unwritten:
        self._ensure()
        child = self._child
        if child is None or child.stdin is None:
            return self._unknown()
        sent = False
        while True:
            # Answers come in the order of the requests: only the last one is of this call.
            if not sent and self._owed < MOST_OWED:
                os.write(child.stdin.fileno(), b"look %d\n" % balloon_root)
                self._owed += 1
                sent = True
            line = self._line(child, deadline)
            if line is None:
                return self._unknown()
            self._owed -= 1
            answer = self._parsed(line)
            if sent and not self._owed:
                return answer

    def _line(self, child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        """The next answer; None when the time is over. EOFError when the child is gone."""
        assert child.stdout is not None
        number = child.stdout.fileno()
        poll = select.poll()
        poll.register(number, select.POLLIN)
        while b"\n" not in self._received:
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                return None
            received = os.read(number, _READ)
            if not received:
                raise EOFError
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _parsed(self, line: bytes) -> Unwritten:
        if line.startswith(b"error"):
            return self._unknown()
        known, size, files, scanned = map(int, line.split())
        self._last = Unwritten(size, known=bool(known), files=files, scanned=scanned)
        return self._last

    def _reap(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._child.wait()
        self._child = None
        self._forget()
