"""What the parts of a resize job's work share: the job, whom to tell of it, when to stop, what has happened so far."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass

from storaged.core import events as ev
from storaged.errors import FilesystemError
from storaged.resize.job import Job

Tell = Callable[[ev.JobPrepared | ev.JobProgressed | ev.JobEnded], None]


@dataclass(slots=True)
class Work:
    """One job being worked on. Only the thread that works on it changes it; anybody may set `stop`."""

    job: Job
    tell: Tell
    settle: Callable[[], None]
    """Brings the balloon back to the size that the host is owed."""
    stop: threading.Event
    moved: int = 0
    """Bytes."""
    kernel_refused: bool = False
    refused: bool = False
    """The kernel found no room for what a best effort only tried."""

    def heed(self) -> None:
        """Raises ECANCELED once the job is to stop."""
        if self.stop.is_set():
            raise FilesystemError("cancelled", errno.ECANCELED)

    def prepared(self) -> None:
        """What had to be done before the first call is done."""
        self.tell(ev.JobPrepared(self.job.id))

    def progress(self, size: int, moved: int, to_move: int, at: float) -> None:
        """`moved` bytes of `to_move`, and the size that is certain by now."""
        self.tell(ev.JobProgressed(self.job.id, size, moved, to_move, at))
