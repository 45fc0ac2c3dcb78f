"""Runs the kernel's resize, and its balance of one chunk, in a child process: so they can be cancelled and killed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

from storaged.btrfs import ioctl, resize_worker
from storaged.btrfs.filesystem import BtrfsFilesystem, kernel
from storaged.errors import FilesystemError, Kind

_REASONS = {
    errno.ENOSPC: "no room to move what lies above the new end",
    errno.EFBIG: "the device is smaller than that",
    errno.ECANCELED: "cancelled",
    errno.ETXTBSY: "an active swap file lies above the new end",
    errno.EROFS: "the filesystem is read-only",
    errno.EPERM: "not permitted (CAP_SYS_ADMIN is needed)",
}
_REASONS_TO_STAY = {
    errno.ENOSPC: "no room for what is in it",
    errno.ETXTBSY: "an active swap file lies in it",
}


class ChildResizer:
    """The resize calls of one filesystem. `resize` from one thread at a time, `cancel` from any."""

    def __init__(self, filesystem: BtrfsFilesystem) -> None:
        self._fs = filesystem
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._moving = False

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start the child now, so that the first resize does not wait for it."""
        with self._lock:
            if self._child is not None and self._child.poll() is None:
                return
            self._reap()
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", resize_worker.__file__, str(self._fs.fd), str(self._fs.devid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self._fs.fd,),
                start_new_session=True,
                env={},
            )

    def resize(self, size: int) -> None:
        number = self._ask(b"size %d\n" % size)
        if number:
            reason = _REASONS.get(number, os.strerror(number))
            raise FilesystemError(f"resize to {size} bytes: {reason}", number)

    def move_out(self, logical: int, *, metadata: bool = False) -> None:
        self._moving = True
        try:
            number = self._ask((b"metadata %d\n" if metadata else b"move %d\n") % logical)
        finally:
            self._moving = False
        if number:
            reason = _REASONS_TO_STAY.get(number) or _REASONS.get(number, os.strerror(number))
            kind = "metadata" if metadata else "data"
            raise FilesystemError(f"moving the {kind} chunk at {logical}: {reason}", number)

    def _ask(self, request: bytes) -> int:
        """The kernel's errno, 0 for success. Raises when the kernel is busy or the child is gone."""
        self.start()
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            raise FilesystemError("the resize process could not be started", errno.ECHILD, Kind.UNAVAILABLE)
        try:
            os.write(child.stdin.fileno(), request)
            answer = child.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            self._reap()
            raise FilesystemError("the resize process was killed", errno.ECANCELED, Kind.UNAVAILABLE)
        result, number = map(int, answer.split())
        if result > 0 or number == errno.EINPROGRESS:
            raise FilesystemError(
                f"an exclusive operation is in the way ({self._fs.space().exclusive_operation})",
                errno.EINPROGRESS,
                Kind.BUSY,
            )
        return number

    def cancel(self) -> None:
        # Only a balance of ours: one that somebody else runs or has paused is not ours to end. Ours is never paused.
        if self._moving and "paused" in self._fs.space().exclusive_operation:
            return
        cancel = ioctl.cancel_balance if self._moving else ioctl.cancel_resize
        try:
            with kernel("cancelling the resize"):
                cancel(self._fs.fd)
        except FilesystemError as error:
            if error.errno not in {errno.ENOTCONN, errno.ECANCELED}:  # nothing was running; it has stopped by now
                raise

    def written(self) -> int:
        pid = self.pid
        if pid is None:
            return 0
        try:
            with open(f"/proc/{pid}/task/{pid}/io", encoding="ascii") as file:
                for line in file:
                    if line.startswith("write_bytes:"):
                        return int(line.split()[1])
        except OSError:
            pass  # it has just ended, or the kernel has no I/O accounting
        return 0

    def close(self) -> None:
        with self._lock:
            if self._child is not None:
                self._child.kill()
                self._reap()

    def _reap(self) -> None:
        if self._child is None:
            return
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.wait()
        self._child = None
