"""What the storage core believes: plain values, and the table of what can happen to a balloon."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from storaged.core import events as ev
from storaged.core import pressure as pr
from storaged.core.model import Config, DirtyLimits, HostReport, KernelReclaim
from storaged.resize import job as jb


class BalloonState(enum.Enum):
    """What the balloon is doing."""

    IDLE = "idle"
    INFLATING = "inflating"
    DEFLATING = "deflating"
    FAILED = "failed"


class BalloonSignal(enum.Enum):
    """What can happen to the balloon."""

    TIGHTEN = "tighten"  # a smaller limit than before
    LOOSEN = "loosen"
    SETTLED = "settled"
    FAILED = "failed"


BALLOON_AFTER: dict[BalloonState, dict[BalloonSignal, BalloonState]] = {
    state: {
        BalloonSignal.TIGHTEN: BalloonState.INFLATING,
        BalloonSignal.LOOSEN: BalloonState.DEFLATING,
        BalloonSignal.SETTLED: BalloonState.IDLE,
        BalloonSignal.FAILED: BalloonState.FAILED,
    }
    for state in BalloonState
}
"""The newest signal wins: a balloon may turn round, or be told to settle, in any state."""


@dataclass(frozen=True, slots=True)
class Balloon:
    """What is known of the balloon. `limit` None means that nothing is held back."""

    state: BalloonState = BalloonState.IDLE
    limit: int | None = None
    size: int = 0
    pending: bool = False  # a HoldAvailable is under way
    asked: bool = False  # somebody waits for an answer
    failures: int = 0
    reason: str = ""
    retry_at: float | None = None
    relief: int = 0  # given to metadata since the last report
    warning: str = ""  # what is not as it should be though the promise holds
    guard_at: float | None = None


@dataclass(frozen=True, slots=True)
class State:
    """Everything the daemon believes."""

    config: Config = field(default_factory=Config)
    pressure: pr.Pressure = field(default_factory=pr.Pressure)
    report: HostReport | None = None
    ignored_reports: int = 0
    balloon: Balloon = field(default_factory=Balloon)
    dirty_found: DirtyLimits | None = None
    reclaim_found: KernelReclaim | None = None
    restore_at: float | None = None  # the write-back limits could not be put back: try again then
    trimmed_at: float | None = None
    reclaimed: int = 0
    job: jb.Job | None = None
    poll_at: float | None = None

    @property
    def active_job(self) -> jb.Job | None:
        """The job that has not ended, if any."""
        return self.job if self.job is not None and self.job.active else None


Result = tuple[State, tuple[ev.Effect, ...]]
