"""What happens to a shared pool (events) and what it asks of the world (effects): frozen data, no behaviour.

`at` is monotonic seconds, sizes are bytes. An epoch is one bracket of reads: statvfs, every running guest's
image, statvfs again. It comes as one PoolSampled with the smaller free, `at` being when the bracket began.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from storaged.host.leases import Answer

# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolSampled:
    """An epoch: `free` bytes on the pool, and what each running guest's image takes of it (st_blocks).

    `total`: bytes of the pool; 0 when not known. `sizes`: what each image would take with no hole in it (st_size).
    """

    free: int
    at: float
    images: Mapping[str, int] = field(default_factory=dict)
    total: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GuestJoined:
    """A guest is known, and runs unless `running` is False: to be told *before* its machine starts.

    `size` is the most that its image can take, `keeps` what it is known to hold itself to until it is told
    otherwise (a balloon that survived a restart); None when nothing is known. `ceiling` is the size of its image up to
    which an earlier process may have let it write; 0 when none did.
    """

    guest: str
    size: int
    image: int
    at: float
    weight: float = 1.0
    running: bool = True
    keeps: int | None = None
    ceiling: int = 0


@dataclass(frozen=True, slots=True)
class GuestChanged:
    """A guest's weight, or the most that its image can take, is another now; to be told before an image grows."""

    guest: str
    at: float
    weight: float | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class GuestRestarted:
    """The guest's agent, or all of its machine, has started anew: it may know no bound, or still be bound."""

    guest: str
    at: float


@dataclass(frozen=True, slots=True)
class GuestLeft:
    """The guest's machine has ended: nothing writes to its image any more. Never said of one that is merely silent."""

    guest: str
    at: float
    forget: bool = False


@dataclass(frozen=True, slots=True)
class GuestSampled:
    """One image was read by itself; best right after each GrantAcked."""

    guest: str
    image: int
    at: float


@dataclass(frozen=True, slots=True)
class GrantAcked:
    """The guest answered SetGrant `seq`. `refused`: why it did not get there; `answer` says where it stands."""

    guest: str
    seq: int
    answer: Answer
    at: float
    refused: str = ""


@dataclass(frozen=True, slots=True)
class GrantsAcked:
    """Several at once, in this order: a thousand answers cost one step."""

    acks: tuple[GrantAcked, ...]


@dataclass(frozen=True, slots=True)
class GrantFailed:
    """SetGrant `seq` had no good answer. `certain`: it surely never reached the guest, and never will."""

    guest: str
    seq: int
    reason: str
    at: float
    certain: bool = False


@dataclass(frozen=True, slots=True)
class PotentialReported:
    """The guest reports that it has used and can still use `potential` bytes (see `leases`)."""

    guest: str
    potential: int
    sequence: int
    at: float


@dataclass(frozen=True, slots=True)
class ClaimSet:
    """A resize of the guest may write `size` bytes more than the guest itself may; 0 when it no longer does."""

    guest: str
    size: int
    at: float


@dataclass(frozen=True, slots=True)
class FenceLifted:
    """An operator gives a guest that exceeded its grant its share again."""

    guest: str
    at: float


@dataclass(frozen=True, slots=True)
class GuestSilent:
    """The guest's machine runs, but nobody in it answers."""

    guest: str
    at: float


@dataclass(frozen=True, slots=True)
class RoomAsked:
    """The guest pleads for `size` bytes beyond what it may write now."""

    guest: str
    size: int
    at: float


@dataclass(frozen=True, slots=True)
class Suspended:
    """The guest's machine sleeps: it keeps what it was promised, and is not spoken to."""

    guest: str
    at: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """The guest's machine runs again."""

    guest: str
    at: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    at: float


Event = (
    PoolSampled
    | GuestJoined
    | GuestChanged
    | GuestRestarted
    | GuestLeft
    | GuestSampled
    | GrantAcked
    | GrantsAcked
    | GrantFailed
    | PotentialReported
    | ClaimSet
    | FenceLifted
    | GuestSilent
    | RoomAsked
    | Suspended
    | Resumed
    | Tick
)

# --- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetGrant:
    """Tell the guest that its applications may write `size` bytes from now on; end in GrantAcked or GrantFailed.

    Calls to one guest reach it in the order of `seq`. A guest that holds 1 GiB back by itself is told 1 GiB more.
    """

    guest: str
    size: int
    seq: int


@dataclass(frozen=True, slots=True)
class Poll:
    """Take the next epoch at most `interval_s` from now; the newest Poll counts."""

    interval_s: float


@dataclass(frozen=True, slots=True)
class Publish:
    """Something that others look at has changed."""


class Topic(enum.Enum):
    """What a note is about."""

    LEVEL = "level"
    BROKEN = "broken"  # the promises exceed what is there, though nobody was promised more
    RESTORED = "restored"
    OVERRUN = "overrun"  # a guest wrote more than it was granted
    FENCE = "fence"  # it may have a grant again
    GUEST = "guest"


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the log and the console."""

    topic: Topic
    text: str
    guest: str = ""
    warning: bool = False


Effect = SetGrant | Poll | Publish | Note
