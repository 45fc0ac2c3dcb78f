"""What the host believes about a pool and its guests: frozen, in bytes and seconds."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from storaged.host.leases import Lease, outstanding
from storaged.host.levels import Pressure
from storaged.host.settings import Sharing


class Presence(enum.Enum):
    """Where a guest stands."""

    CONFIGURED = "configured"  # known, its machine does not run
    DISCOVERED = "discovered"  # runs, has not answered yet
    UP = "up"
    HANGING = "hanging"  # runs, does not answer
    SUSPENDED = "suspended"
    GONE = "gone"  # its machine has ended


RUNNING = (Presence.UP, Presence.HANGING, Presence.SUSPENDED, Presence.DISCOVERED)
"""No set: an enumeration's hash is reckoned in Python, and every look asks for every guest."""


@dataclass(frozen=True, slots=True)
class Guest:
    """One guest. `image` is the newest reading; `counted` that of the pool's epoch, None before there was one."""

    name: str
    size: int
    image: int
    seen_at: float
    weight: float = 1.0
    presence: Presence = Presence.DISCOVERED
    lease: Lease = field(default_factory=Lease)
    counted: int | None = None
    rate: float = 0.0
    pleads: int = 0
    pleads_until: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    overran: float = 0.0  # charged on top, fades
    overruns: int = 0
    fenced_until: float = 0.0  # until then it is granted nothing, because it exceeded its grant
    claim: int = 0  # what a resize of it may write besides
    claim_asked: int = 0  # as large it is to be, once others have given that up; 0 when it is not to grow
    over_since: float = 0.0  # its image exceeds its ceiling, which a report may still explain
    restarted_at: float = 0.0  # when its agent was last believed to have started

    @property
    def runs(self) -> bool:
        """True while something may write to its image."""
        return self.presence in RUNNING

    @property
    def left(self) -> int:
        """What it may still write, at most; the rest of its disk when nothing better is known."""
        if self.lease.bound:
            return outstanding(self.lease, self.image, self.size)
        return self.usable

    @property
    def usable(self) -> int:
        """What could still be written to its image at all."""
        return max(self.size - self.image, 0)

    @property
    def still(self) -> bool:
        """While its image stays as it is, nothing of it changes with time."""
        return not (
            self.rate
            or self.lease.flight is not None
            or self.failures
            or self.pleads_until
            or self.overran
            or self.over_since
            or self.fenced_until
            or self.claim_asked
        )

    @property
    def mute(self) -> bool:
        """Its agent has not answered since it was seen first, and was asked."""
        return not self.lease.bound and self.failures > 0

    @property
    def claim_lacks(self) -> int:
        """By how much its claim is to grow."""
        return max(self.claim_asked - self.claim, 0)

    @property
    def likely(self) -> int:
        """What it may still write by its own reckoning: never more than `left`, and never counted on."""
        return max(min(self.lease.likely - self.image, self.left), 0) if self.lease.bound else self.left


@dataclass(frozen=True, slots=True)
class Pool:
    """The pool at its newest epoch, and what was learnt of it. `whole`: every running guest was in that epoch."""

    free: int = 0
    at: float | None = None
    total: int = 0
    whole: bool = False
    outside: float = 0.0  # worst bytes a second that others on the host wrote, fading
    falls: float = 0.0  # bytes a second by which free falls, smoothed
    answer_s: float = 0.0  # worst time a guest took to answer, fading
    reserve: int = 0
    interval_s: float = 0.0
    pressure: Pressure = field(default_factory=Pressure)


@dataclass(frozen=True, slots=True)
class Books:
    """`promised`: what bound guests may still write. `unbound`: what is set aside for those who know no bound."""

    free: int
    reserve: int
    promised: int
    unbound: int

    @property
    def set_aside(self) -> int:
        """All that guests may still write, by promise or because nothing bounds them."""
        return self.promised + self.unbound

    @property
    def slack(self) -> int:
        """What is promised to nobody; negative when too much is promised."""
        return self.free - self.reserve - self.set_aside


@dataclass(frozen=True, slots=True)
class Settled:
    """What a decision was made of that found nothing to do, and would not for `Sharing.least` bytes less or more."""

    guests: Mapping[str, Guest]
    free: int
    reserve: int


@dataclass(frozen=True, slots=True)
class State:
    """All that the host believes about one pool. Pools share nothing: two pools are two states."""

    settings: Sharing = field(default_factory=Sharing)
    pool: Pool = field(default_factory=Pool)
    guests: Mapping[str, Guest] = field(default_factory=dict)
    seq: int = 0
    holds: bool | None = None  # the invariant, as last said; None before the first time
    settled: Settled | None = None


def charge(guest: Guest, settings: Sharing) -> int:
    """What is set aside for a running guest, as of the pool's epoch."""
    image = guest.image if guest.counted is None else guest.counted
    extra = int(guest.overran) + guest.claim
    ahead = 2 * int(guest.rate * settings.horizon_s)
    if guest.lease.bound:
        left = outstanding(guest.lease, image, guest.size)
        if not guest.lease.proven:
            left = min(left + ahead, max(guest.size - image, 0))
        return left + extra
    # Its whole disk may be more than there is, and then no other guest could have anything. One that was asked and did
    # not answer is set aside what it is seen to write.
    likely = ahead if guest.mute else ahead + 2 * settings.base
    flight = guest.lease.flight
    likely += max(flight.size if flight else 0, guest.lease.ceiling - image)
    return min(max(guest.size - image, 0), likely) + extra


def books(state: State) -> Books:
    """What is promised, against what is there."""
    promised = unbound = 0
    for guest in state.guests.values():
        if guest.runs:
            if guest.lease.bound:
                promised += charge(guest, state.settings)
            else:
                unbound += charge(guest, state.settings)
    return Books(state.pool.free, state.pool.reserve, promised, unbound)


def established(state: State) -> bool:
    """The invariant: every running guest is bound, and proven, and counted, and the promises fit."""
    if state.pool.at is None or not state.pool.whole:
        return False
    bound = all(guest.lease.bound and guest.lease.proven for guest in state.guests.values() if guest.runs)
    return bound and books(state).slack >= 0
