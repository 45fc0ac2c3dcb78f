"""Leases: what a guest may still write, as an upper bound that can be proved from what the host itself sees.

A guest that may write A bytes and whose image takes B can bring the image to A + B and no further. A write lowers A
and raises B alike, a discard does the reverse, so this *ceiling* stands still whatever the guest does: it moves only
when a grant is applied. A grant of `g`, applied when the image took B', sets it to g + B'.

1. A grant under way may be applied at once, late, or after the guest has spent all that it had. Until it is
   acknowledged the ceiling counts both: the old one plus the grant. This holds for a smaller grant too.
2. B' is at most the largest image seen from before the grant was sent until after it was acknowledged, as long as the
   guest did not write and discard again in between, unseen. The reserve pays for that, and the guest's own words
   (`available`) can raise the ceiling; they never lower it.
3. What the guest `likely` may still write can be less: it discarded a lot while a grant was on its way, and that came
   on top of the smaller grant only for us. Safety never counts on it, but such a guest is in need, and told anew.
4. A call that failed, but perhaps arrived, stays counted until a later one is acknowledged: they are applied in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Flight:
    """A grant that was sent. `peak` is the largest image seen since just before."""

    seq: int
    size: int
    sent_at: float
    before: int
    peak: int
    acked_at: float | None = None
    available: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """The image grows to `ceiling` at most, to `likely` if it applied the last grant when it said so.

    Not `bound`: nothing is known but the size of the disk.
    """

    ceiling: int = 0
    likely: int = 0
    bound: bool = False
    granted: int = 0
    flight: Flight | None = None


def kept(image: int, keeps: int | None) -> Lease:
    """The lease of a guest that is known to hold itself to `keeps`; unbound for None."""
    return Lease() if keeps is None else Lease(image + keeps, image + keeps, bound=True, granted=keeps)


def sent(lease: Lease, image: int, seq: int, size: int, at: float) -> Lease:
    """The lease once a grant is on its way; `image` was read before it was sent."""
    flight = Flight(seq, size, at, lease.ceiling, image)
    # Here and below written out where a thousand guests pass at once: `replace` costs several times as much.
    return Lease(lease.ceiling + size, lease.likely, lease.bound, lease.granted, flight)


def acked(lease: Lease, seq: int, available: int, at: float) -> Lease:
    """The lease once the guest has answered; it settles with the next look at the image."""
    was = lease.flight
    if was is None or was.seq != seq:
        return lease
    flight = Flight(seq, was.size, was.sent_at, was.before, was.peak, at, available)
    return Lease(lease.ceiling, lease.likely, lease.bound, lease.granted, flight)


def failed(lease: Lease, seq: int, *, certain: bool) -> Lease:
    """The lease once a call has failed: as before if it `certain`ly never arrived, else with both counted."""
    if lease.flight is None or lease.flight.seq != seq:
        return lease
    return replace(lease, ceiling=lease.flight.before if certain else lease.ceiling, flight=None)


def seen(lease: Lease, image: int, at: float) -> Lease:
    """The lease after the image was read at `at`."""
    flight = lease.flight
    if flight is None:
        return lease
    peak = max(flight.peak, image)
    if flight.acked_at is None or at < flight.acked_at:
        return lease if peak == flight.peak else replace(lease, flight=replace(flight, peak=peak))
    ceiling = flight.size + peak
    if lease.bound:
        ceiling = min(ceiling, lease.ceiling)
    # The guest's word counts where it makes the host more careful: what it could not take from its applications.
    ceiling += max(flight.available - flight.size, 0)
    return Lease(ceiling, flight.size + image, bound=True, granted=flight.size)


def outstanding(lease: Lease, image: int, size: int) -> int:
    """What a bound guest may still write when its image takes `image` of at most `size`."""
    return max(min(lease.ceiling, size) - image, 0)
