"""A resize from end to end: what it is, what happens to it (events), what it asks of the world (effects). Frozen."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Stage(enum.Enum):
    """Where a resize is."""

    PREPARING = "preparing"
    IMAGE = "image"
    CAPACITY = "capacity"
    BALLOON = "balloon"
    FILESYSTEM = "filesystem"
    VERIFYING = "verifying"
    RESTORING = "restoring"
    ENDED = "ended"


class Outcome(enum.Enum):
    """How a resize ended, or will end once what was begun is taken back."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Direction(enum.Enum):
    """By the image: a filesystem that is smaller than its image, and grows within it, is on the way of a shrink."""

    UNKNOWN = "unknown"  # until everybody was asked
    GROW = "grow"
    SHRINK = "shrink"


@dataclass(frozen=True, slots=True)
class Saga:
    """One resize. Sizes in bytes, times in seconds since the epoch; `image` and `filesystem` None: not known.

    `start` is the filesystem's size and `image_start` the image's when it began. `sent`: the guest may have been asked.
    """

    id: str
    guest: str
    to: int
    started: float
    start: int = 0
    image_start: int = 0
    direction: Direction = Direction.UNKNOWN
    stage: Stage = Stage.PREPARING
    sent: bool = False
    cancelling: bool = False
    outcome: Outcome | None = None
    reason: str = ""
    image: int | None = None
    filesystem: int | None = None
    moved: int = 0
    progress: float = 0.0
    rate: float | None = None
    eta: float | None = None
    ended: float = 0.0
    resumed: int = 0

    @property
    def active(self) -> bool:
        """False once it has ended."""
        return self.stage is not Stage.ENDED


# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What everybody says: the image's size, the filesystem's as read from the image, the least that it can have."""

    image: int
    filesystem: int
    minimum: int = 0


@dataclass(frozen=True, slots=True)
class ImageIs:
    """The image has this size now, and was made durable."""

    size: int


@dataclass(frozen=True, slots=True)
class CapacitySeen:
    """The guest's kernel sees the larger disk."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """News of the guest's job. `moving`: the balloon has made way."""

    filesystem: int
    moving: bool
    moved: int = 0
    share: float = 0.0
    rate: float | None = None
    eta: float | None = None


@dataclass(frozen=True, slots=True)
class GuestEnded:
    """The guest has no job any more, and its filesystem this size. `reason` says why it is not what was asked for."""

    filesystem: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verified:
    """Read from the image itself."""

    image: int
    filesystem: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """A work that waits has ended because a cancel was asked."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The stage's work failed. Sizes are what is known to be true now."""

    reason: str
    image: int | None = None
    filesystem: int | None = None


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Somebody wants it to stop."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The host's daemon has started again."""


Event = (
    Surveyed | ImageIs | CapacitySeen | Progressed | GuestEnded | Verified | Stopped | Failed | CancelAsked | Resumed
)

# --- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Save:
    """Write the saga down; what follows waits until it is on the disk."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Ask for all sizes: Surveyed."""


@dataclass(frozen=True, slots=True)
class GrowImage:
    """Make the image this large unless it is already: ImageIs."""

    size: int


@dataclass(frozen=True, slots=True)
class CutImage:
    """Cut the image to this size unless it is already; never below the filesystem as read from it: ImageIs."""

    size: int


@dataclass(frozen=True, slots=True)
class AwaitCapacity:
    """Until the guest's disk has this size: CapacitySeen."""

    size: int


@dataclass(frozen=True, slots=True)
class ResizeFilesystem:
    """Have the guest bring its filesystem to this size, or follow the job that does: Progressed, then GuestEnded."""

    size: int


@dataclass(frozen=True, slots=True)
class Verify:
    """Read both sizes from the image: Verified."""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """The work under way should end early if it can: a wait by Stopped, the guest's job by being cancelled."""


Effect = Save | Survey | GrowImage | CutImage | AwaitCapacity | ResizeFilesystem | Verify | Interrupt
