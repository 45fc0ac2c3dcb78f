"""A resize job's life, as a table, and what is known of it on the way.

A job starts in one of two states and ends exactly once, in DONE, FAILED or CANCELLED. Whatever happens,
`current_size` is a size the filesystem really has.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class JobState(enum.Enum):
    """Where a job is in its life."""

    REQUESTED = "requested"
    WAITING = "waiting for capacity"
    PREPARING = "preparing"
    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def active(self) -> bool:
        """False once the job has ended."""
        return bool(TRANSITIONS[self])


class Signal(enum.Enum):
    """What can happen to a job."""

    CAPACITY_SHORT = "capacity short"  # the device is smaller than the request
    CAPACITY_THERE = "capacity there"
    PREPARED = "prepared"  # the balloon has made room
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCEL = "cancel asked"
    STOPPED = "stopped"  # the kernel gave up because it was asked to


TRANSITIONS: dict[JobState, dict[Signal, JobState]] = {
    JobState.REQUESTED: {
        Signal.CAPACITY_SHORT: JobState.WAITING,
        Signal.CAPACITY_THERE: JobState.PREPARING,
    },
    JobState.WAITING: {
        Signal.CAPACITY_SHORT: JobState.WAITING,
        Signal.CAPACITY_THERE: JobState.PREPARING,
        Signal.FAILED: JobState.FAILED,
        Signal.CANCEL: JobState.CANCELLED,
    },
    JobState.PREPARING: {
        Signal.PREPARED: JobState.RUNNING,
        Signal.SUCCEEDED: JobState.DONE,
        Signal.FAILED: JobState.FAILED,
        Signal.STOPPED: JobState.FAILED,  # as below
        Signal.CANCEL: JobState.CANCELLING,
    },
    JobState.RUNNING: {
        Signal.PREPARED: JobState.RUNNING,
        Signal.SUCCEEDED: JobState.DONE,
        Signal.FAILED: JobState.FAILED,
        Signal.CANCEL: JobState.CANCELLING,
        Signal.STOPPED: JobState.FAILED,  # nobody here asked: the child was killed or cancelled by another hand
    },
    JobState.CANCELLING: {
        Signal.PREPARED: JobState.CANCELLING,
        Signal.CANCEL: JobState.CANCELLING,
        Signal.STOPPED: JobState.CANCELLED,
        Signal.FAILED: JobState.FAILED,
        Signal.SUCCEEDED: JobState.DONE,  # the end came before the cancel
    },
    JobState.DONE: {},
    JobState.FAILED: {},
    JobState.CANCELLED: {},
}


@dataclass(frozen=True, slots=True)
class Job:
    """One resize job. Sizes in bytes, `started`, `ended` in seconds since the epoch, `began`, `deadline` monotonic."""

    id: str
    requested: int
    start_size: int
    current_size: int
    state: JobState = JobState.REQUESTED
    started: float = 0.0
    ended: float = 0.0
    began: float = 0.0
    deadline: float = 0.0
    moved: int = 0
    to_move: int = 0
    progress: float = 0.0
    rate: float | None = None
    eta: float | None = None
    reason: str = ""
    best_effort: bool = False
    """A shrink that goes towards `requested` as far as it can; what it reached is its success."""

    @property
    def shrinks(self) -> bool:
        """True when the job makes the filesystem smaller."""
        return self.requested < self.start_size

    @property
    def target(self) -> int:
        """What the filesystem should have: a best effort that is done was for what it reached."""
        return self.current_size if self.best_effort and self.state is JobState.DONE else self.requested

    @property
    def active(self) -> bool:
        """False once the job has ended."""
        return self.state.active


def signalled(job: Job, signal: Signal) -> Job:
    """The job after `signal`; unchanged when the signal means nothing in its state."""
    return replace(job, state=TRANSITIONS[job.state].get(signal, job.state))


def progressed(job: Job, *, current_size: int, moved: int, to_move: int, now: float) -> Job:
    """The job with news of its work. `now` is monotonic, in seconds; progress never goes back, never says 1.

    The rate is the mean over the job so far: relocation speed varies by chunk, and a mean that only ever
    smooths makes a time left that does not jump.
    """
    moved = max(moved, job.moved)
    to_move = max(to_move, moved)
    if to_move > 0:
        share = moved / to_move
    else:
        span = job.start_size - job.requested
        share = (job.start_size - current_size) / span if span else 0.0
    progress = min(max(share, job.progress, 0.0), 0.999)
    elapsed = now - job.began
    rate = moved / elapsed if moved and elapsed > 0 else None
    eta = (to_move - moved) / rate if rate else None
    return replace(job, current_size=current_size, moved=moved, to_move=to_move, progress=progress, rate=rate, eta=eta)


def ended(job: Job, signal: Signal, *, current_size: int, reason: str, now: float) -> Job:
    """The job in the end state that `signal` leads to. `now` is seconds since the epoch."""
    last = signalled(job, signal)
    done = last.state is JobState.DONE
    exactly = done and not job.best_effort
    return replace(
        last,
        current_size=job.requested if exactly else current_size,
        progress=1.0 if done else last.progress,
        rate=None,
        eta=None,
        ended=now,
        reason=reason,
    )
