"""Does a resize job's work, and always says the last word: how it ended, why, and what is true then.

Blocking, in a thread of its own; what happens is told through one callback. The work itself is `descent`'s and
`effort`'s.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

from storaged.balloon.engine import BalloonEngine
from storaged.core import events as ev
from storaged.core.ports import Clock, Filesystem, Resizer
from storaged.errors import FilesystemError, Kind, StoragedError
from storaged.resize.calls import BUSY_WAIT_S, KernelCalls
from storaged.resize.descent import Descent
from storaged.resize.effort import BestEffort
from storaged.resize.heal import Healer
from storaged.resize.job import Job
from storaged.resize.work import Tell, Work
from storaged.units import sector_floor

POLL_S = 0.1
CANCEL_TRIES = 50


class ResizeRunner:
    """Runs at most one job at a time on one filesystem."""

    def __init__(
        self,
        filesystem: Filesystem,
        resizer: Resizer,
        balloon: BalloonEngine,
        clock: Clock,
        *,
        poll_s: float = POLL_S,
        impact: Callable[[], str] = lambda: "high",
    ) -> None:
        self._fs = filesystem
        self._resizer = resizer
        self._clock = clock
        self._poll_s = poll_s
        self._stops: dict[str, threading.Event] = {}  # by job; made by whichever comes first, work or cancel
        self._running = ""
        self._healer = Healer(filesystem, resizer, balloon.reclaim, poll_s=poll_s, patience_s=BUSY_WAIT_S)
        self.recover = self._healer.recover
        self._calls = KernelCalls(filesystem, resizer, clock, poll_s, impact)
        self._descent = Descent(filesystem, balloon, self._calls, self._healer)
        self._effort = BestEffort(filesystem, balloon, self._calls, self._descent, self._healer)

    def run(self, job: Job, tell: Tell, settle: Callable[[], None]) -> None:
        """Do the job's work; returns after JobEnded was told, whatever happened.

        `settle` is called before that, to bring the balloon back to the size the host is owed.
        """
        work = Work(job, tell, settle, self._stops.setdefault(job.id, threading.Event()))
        self._running = job.id
        try:
            outcome, reason = self._attempt(work)
        except Exception as error:  # noqa: BLE001  # whatever it is, the job must end
            outcome, reason = ev.Outcome.FAILED, str(error) or repr(error)
        finally:
            self._running = ""
            self._stops.pop(job.id, None)
        try:
            settle()
        except Exception as error:  # noqa: BLE001  # the job's end is told all the same
            reason = reason or f"the balloon did not come back: {error}"
        now, wall = self._clock.monotonic(), self._clock.wall()
        tell(ev.JobEnded(job.id, outcome, self._true_size(job), reason, now, wall, work.moved))

    def cancel(self, job_id: str) -> None:
        """Stop the job; its JobEnded says how it ended. Blocks until the kernel has let go, some seconds at most."""
        self._stops.setdefault(job_id, threading.Event()).set()
        for _ in range(CANCEL_TRIES):
            # Again and again: one that comes between two kernel calls finds nothing running.
            if self._running != job_id:
                return
            self._resizer.cancel()
            time.sleep(self._poll_s)

    def _attempt(self, work: Work) -> tuple[ev.Outcome, str]:
        """Do the work; how it came out and why."""
        wanted = sector_floor(work.job.requested)
        try:
            if work.job.shrinks:
                return self._shrink(work, wanted)
            self._grow(work, wanted)
        except FilesystemError as error:
            if work.refused and error.errno != errno.ECANCELED:
                self._healer.heal(FilesystemError("", errno.ENOSPC))  # whatever ended it now
            healed = self._healer.heal(error) if work.kernel_refused or error.errno == errno.EROFS else ""
            stopped = error.errno == errno.ECANCELED
            return ev.Outcome.STOPPED if stopped else ev.Outcome.FAILED, error.message + healed
        return self._judge(wanted, "")

    def _shrink(self, work: Work, wanted: int) -> tuple[ev.Outcome, str]:
        why = ""
        try:
            if work.job.best_effort:
                why = self._effort.run(work)
            else:
                self._descent.to(work, wanted)
            why += self._descent.leave_well(work)
        except FilesystemError as error:
            if error.errno != errno.ECANCELED or self._fs.size() != wanted:
                raise
            why += self._healer.heal(error)  # the end came before the cancel
        why = why.removeprefix("; ")
        if work.job.best_effort and not self._fs.space().read_only:
            return ev.Outcome.SUCCEEDED, why
        return self._judge(wanted, why)

    def _grow(self, work: Work, wanted: int) -> None:
        if (size := self._fs.size()) > wanted:
            # Somebody else has grown it meanwhile: going back is a shrink, which nobody has judged.
            raise FilesystemError(f"the filesystem has {size} bytes by now; ask again", kind=Kind.OUT_OF_RANGE)
        work.prepared()
        self._calls.resize(work, work.job.requested)

    def _judge(self, wanted: int, why: str) -> tuple[ev.Outcome, str]:
        """Whether the filesystem has the size that was asked for, after all that was done."""
        if self._fs.space().read_only:  # a commit that failed may have been told to nobody
            return ev.Outcome.FAILED, why or self._healer.heal(FilesystemError("", errno.EROFS)).removeprefix("; ")
        size = self._fs.size()
        if size != wanted:
            return ev.Outcome.FAILED, f"the filesystem has {size} bytes after it" + (f"; {why}" if why else "")
        return ev.Outcome.SUCCEEDED, why

    def _true_size(self, job: Job) -> int:
        try:
            return self._fs.size()
        except (StoragedError, OSError):
            return job.current_size
