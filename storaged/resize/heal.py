"""After a shrink that was refused or cut off: what the kernel remembers of it is made to be forgotten."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from storaged.core.ports import Filesystem, Resizer
from storaged.errors import FilesystemError, Kind, StoragedError
from storaged.resize.job import Job
from storaged.resize.layout import KERNEL_MINIMUM
from storaged.units import SECTOR

TRIES = 50


class Healer:
    """Puts one filesystem right; blocking."""

    def __init__(
        self,
        filesystem: Filesystem,
        resizer: Resizer,
        reclaim: Callable[[], None],
        *,
        poll_s: float,
        patience_s: float,
    ) -> None:
        self._fs = filesystem
        self._resizer = resizer
        self._reclaim = reclaim
        """Hands empty chunks back, never while the balloon inflates into them."""
        self._poll_s = poll_s
        self._patience_s = patience_s

    def recover(self, job: Job) -> str:
        """After a crash while `job` was active: let the kernel's work end, heal what it left; what to say of it.

        The kernel stops a while after the process that asked for it has died. Until then it shows a size that the
        filesystem may never have. After a power cut it goes on by itself with a chunk that was being rewritten.
        """
        until = time.monotonic() + self._patience_s
        while self._fs.space().exclusive_operation in ("resize", "balance") and time.monotonic() < until:
            time.sleep(self._poll_s)
        if not job.shrinks:
            return ""
        return self.heal(FilesystemError("cut off", errno.ECANCELED)).lstrip("; ")

    def heal(self, error: FilesystemError) -> str:
        """After a shrink that found no room, or was cut off, the kernel may refuse writes that fit.

        It remembers that no new chunk could be made, and forgets it only when a chunk goes or the device grows. So the
        filesystem shrinks by a sector and grows back; not where anything lies in that sector, or a chunk would move.
        There it grows by one and shrinks back, if the device has one more. Returns what to say of it.
        """
        try:
            if self._fs.space().read_only:
                return "; the kernel has forced the filesystem read-only: back up, unmount and check it"
            if error.errno not in (errno.ENOSPC, errno.ECANCELED):
                return ""
            size = self._fs.size()
            less = size - SECTOR
            if less >= KERNEL_MINIMUM and all(chunk.top <= less for chunk in self._fs.layout().chunks):
                self.surely(less)
                self.surely(size)
            elif size + SECTOR <= self._fs.device_size():
                self.surely(size + SECTOR)
                self.surely(size)
            else:
                self._reclaim()
        except (StoragedError, OSError) as failure:
            return f"; healing it failed: {failure}"
        return ""

    def surely(self, size: int) -> None:
        """A resize that moves nothing, though somebody may still be cancelling what ran before it."""
        for attempt in range(TRIES):
            try:
                return self._resizer.resize(size)
            except FilesystemError as error:
                passing = error.errno == errno.ECANCELED or error.kind is Kind.BUSY
                if not passing or attempt == TRIES - 1:
                    raise
            time.sleep(self._poll_s)
        return None
