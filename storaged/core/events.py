"""What happens to the storage core (events) and what it asks of the world (effects): frozen data, no behaviour.

`at` is monotonic seconds, `wall` seconds since the epoch, sizes are bytes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from storaged.core.model import DirtyLimits, HostReport, KernelReclaim, Level
from storaged.errors import Kind
from storaged.resize.job import Job

# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostReported:
    """UpdateStorageBalloon came in."""

    report: HostReport


@dataclass(frozen=True, slots=True)
class BalloonSettled:
    """The balloon is at its target for `limit`; it holds `size`."""

    limit: int | None
    size: int
    at: float
    tight: bool = False
    """Metadata headroom is small: look at it again soon."""
    again: bool = False
    """A balance or the cleaner will give room back at its end, or preallocated files are still counted: hold again."""
    warning: str = ""


@dataclass(frozen=True, slots=True)
class BalloonSampled:
    """The space was sampled between reports: `relief` bytes of the balloon were given up for metadata."""

    size: int
    relief: int
    at: float
    tight: bool = False
    calm: bool = False
    """There is a lot of metadata headroom: the next sample need not come soon."""
    warning: str = ""


@dataclass(frozen=True, slots=True)
class BalloonFailed:
    """The balloon could not be brought to its target for `limit`; what it holds is `size`."""

    limit: int | None
    size: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Facts:
    """What must be known to judge a resize request; read just before it is judged."""

    size: int
    device: int
    minimum: int
    why: str = ""
    read_only: bool = False
    exclusive_operation: str = "none"
    job_ran: bool = False
    """A job was running then, so nothing was read for this request."""


@dataclass(frozen=True, slots=True)
class ResizeRequested:
    """A resize is asked for; `id` names the job it would start."""

    size: int
    id: str
    facts: Facts
    at: float
    wall: float
    best_effort: bool = False
    """A shrink that may be asked to go below the minimum, and goes as far as it can."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Somebody asks the job to stop."""

    at: float
    wall: float
    reason: str = "cancelled on request"


@dataclass(frozen=True, slots=True)
class JobPrepared:
    """The balloon has made room; the kernel's resize begins."""

    id: str


@dataclass(frozen=True, slots=True)
class JobProgressed:
    """News of the running job."""

    id: str
    current_size: int
    moved: int
    to_move: int
    at: float


class Outcome(enum.Enum):
    """How a job's work came back."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The job's work is over; `current_size` is the size the filesystem has now."""

    id: str
    outcome: Outcome
    current_size: int
    reason: str
    at: float
    wall: float
    moved: int = 0


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """The device was seen to have `device` bytes."""

    device: int
    at: float
    wall: float


@dataclass(frozen=True, slots=True)
class SuspendRequested:
    """The machine is about to sleep."""

    at: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    at: float
    wall: float


@dataclass(frozen=True, slots=True)
class Recovered:
    """The daemon starts and this is what it found.

    `limit`, `level`, `dirty_found` and `job` come from the journal; the rest from the filesystem itself.
    """

    size: int
    device: int
    available: int
    balloon: int
    at: float
    wall: float
    limit: int | None = None
    level: Level | None = None
    report: HostReport | None = None
    dirty_found: DirtyLimits | None = None
    reclaim_found: KernelReclaim | None = None
    job: Job | None = None


@dataclass(frozen=True, slots=True)
class DirtyLimitsFound:
    """The write-back limits as they were before the daemon touched them."""

    limits: DirtyLimits


@dataclass(frozen=True, slots=True)
class DirtyLimitsRestored:
    """The write-back limits are as they were found."""


@dataclass(frozen=True, slots=True)
class ReclaimFound:
    """The kernel relocates chunks by itself, as `settings` say."""

    settings: KernelReclaim


@dataclass(frozen=True, slots=True)
class ReclaimRestored:
    """The kernel relocates chunks as it was found to."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Blocks were handed back; `error` says why not, empty when they were."""

    size: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class ReleaseRequested:
    """Give everything back: the balloon, the write-back limits."""

    at: float


Event = (
    HostReported
    | BalloonSettled
    | BalloonSampled
    | BalloonFailed
    | ResizeRequested
    | CancelRequested
    | JobPrepared
    | JobProgressed
    | JobEnded
    | CapacityChanged
    | SuspendRequested
    | Tick
    | Recovered
    | DirtyLimitsFound
    | DirtyLimitsRestored
    | ReclaimFound
    | ReclaimRestored
    | Trimmed
    | ReleaseRequested
)

# --- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HoldAvailable:
    """Size the balloon so that applications can write `limit` bytes; None gives all of it back.

    `fresh`: as the host just said. Otherwise what was written since counts against it.
    """

    limit: int | None
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """Compare what is available with what is left of the limit, and take the difference if `adjust`.

    Give metadata its next chunk if it runs out.
    """

    adjust: bool


@dataclass(frozen=True, slots=True)
class Trim:
    """Hand freed blocks back to the host, empty chunks first."""


@dataclass(frozen=True, slots=True)
class SetDirtyLimits:
    """Lower the write-back limits to `dirty_bytes`; report first what was found."""

    dirty_bytes: int


@dataclass(frozen=True, slots=True)
class RestoreDirtyLimits:
    """Set the write-back limits to exactly `limits`, and report that it was done."""

    limits: DirtyLimits


@dataclass(frozen=True, slots=True)
class RuleOutReclaim:
    """Stop the kernel from relocating chunks: the balloon's extents would be written."""


@dataclass(frozen=True, slots=True)
class RestoreReclaim:
    """Let the kernel relocate chunks as `settings` say, and report that it was done."""

    settings: KernelReclaim


@dataclass(frozen=True, slots=True)
class StartResize:
    """Do the job's work."""

    job: Job


@dataclass(frozen=True, slots=True)
class CancelResize:
    """Stop the job's work; its end is reported by JobEnded."""

    id: str


@dataclass(frozen=True, slots=True)
class Sync:
    """Commit what is in flight."""


@dataclass(frozen=True, slots=True)
class Save:
    """Write the journal; durable before the effects that follow and before the next event."""


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the log and the report."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """Answers every UpdateStorageBalloon that waits: `reason` is empty for success."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class IgnoreReport:
    """Answers the UpdateStorageBalloon that just came: the host does not know, nothing changes, that is success."""


@dataclass(frozen=True, slots=True)
class AcceptResize:
    """Answers ResizeFilesystem: started, or already in progress."""

    already: bool = False


@dataclass(frozen=True, slots=True)
class RefuseResize:
    """Answers ResizeFilesystem: not started, with the numbers."""

    kind: Kind
    message: str


@dataclass(frozen=True, slots=True)
class AnswerCancel:
    """Answers CancelResize at once: the job whose end to wait for, None when none is active."""

    id: str | None


Effect = (
    HoldAvailable
    | Sample
    | Trim
    | SetDirtyLimits
    | RestoreDirtyLimits
    | RuleOutReclaim
    | RestoreReclaim
    | StartResize
    | CancelResize
    | Sync
    | Save
    | Note
    | AnswerReport
    | IgnoreReport
    | AcceptResize
    | RefuseResize
    | AnswerCancel
)
