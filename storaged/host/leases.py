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
5. A grant is not all that a guest can write. Its metadata chunks have room that no balloon can take, and what it has
   preallocated needs none. The guest answers with its *reach*, all of that with the grant, and with its *potential*:
   the bytes that it has used and can still use, which writing does not change. Blocks that it counts as used and its
   image does not hold (an image that was made sparse again) are in the potential alone, so the ceiling is at least
   that. A report with a larger potential raises the ceiling by the difference, as long as it says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Answer:
    """What a guest answered to a grant, in bytes of the host's disk.

    `reach`: all that it can still write, by any kind of write. `potential`: what it has used and can still use; None
    where it does not say. `sequence`: of its report at that moment. Not `proven`: the agent answers for its balloon
    alone, and what is preallocated in the guest is not known.
    """

    reach: int
    potential: int | None = None
    sequence: int = 0
    proven: bool = True


@dataclass(frozen=True, slots=True)
class Flight:
    """A grant that was sent. `peak` is the largest image seen since just before."""

    seq: int
    size: int
    sent_at: float
    before: int
    peak: int
    acked_at: float | None = None
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The image grows to `ceiling` plus `raised` at most, to `likely` if it applied the last grant when it said so.

    Not `bound`: nothing is known but the size of the disk. `beyond`: what the guest could write beyond the grant when
    it answered; no smaller grant takes that. `potential` and `sequence` are of that answer, `raised` is by how much a
    later report exceeds it. `tells`: its agent tells a potential; that is None all the same after a call that failed.
    """

    ceiling: int = 0
    likely: int = 0
    bound: bool = False
    granted: int = 0
    flight: Flight | None = None
    beyond: int = 0
    potential: int | None = None
    sequence: int = 0
    raised: int = 0
    proven: bool = True
    tells: bool = False


def kept(image: int, keeps: int | None, ceiling: int = 0) -> Lease:
    """The lease of a guest that is known to hold itself to `keeps`; unbound for None, and set aside up to `ceiling`."""
    return Lease(ceiling=ceiling) if keeps is None else Lease(image + keeps, image + keeps, bound=True, granted=keeps)


def sent(lease: Lease, image: int, seq: int, size: int, at: float) -> Lease:
    """The lease once a grant is on its way; `image` was read before it was sent."""
    flight = Flight(seq, size, at, lease.ceiling, image)
    # Here and below written out where a thousand guests pass at once: `replace` costs several times as much.
    return Lease(
        lease.ceiling + size, lease.likely, lease.bound, lease.granted, flight,
        lease.beyond, lease.potential, lease.sequence, lease.raised, lease.proven, lease.tells,
    )  # fmt: skip


def acked(lease: Lease, seq: int, answer: Answer, at: float) -> Lease:
    """The lease once the guest has answered; it settles with the next look at the image."""
    was = lease.flight
    if was is None or was.seq != seq:
        return lease
    flight = Flight(seq, was.size, was.sent_at, was.before, was.peak, at, answer)
    return Lease(
        lease.ceiling, lease.likely, lease.bound, lease.granted, flight,
        lease.beyond, lease.potential, lease.sequence, lease.raised, lease.proven, lease.tells,
    )  # fmt: skip


def failed(lease: Lease, seq: int, *, certain: bool) -> Lease:
    """The lease once a call has failed: as before if it `certain`ly never arrived, else with both counted."""
    if lease.flight is None or lease.flight.seq != seq:
        return lease
    if certain:
        return replace(lease, ceiling=lease.flight.before, flight=None)
    return replace(lease, flight=None, potential=None)  # what a report says may be of this grant, which counts already


def seen(lease: Lease, image: int, at: float) -> Lease:
    """The lease after the image was read at `at`."""
    flight = lease.flight
    if flight is None:
        return lease
    peak = max(flight.peak, image)
    answer = flight.answer
    if answer is None or flight.acked_at is None or at < flight.acked_at:
        return lease if peak == flight.peak else replace(lease, flight=replace(flight, peak=peak))
    ceiling = flight.size + peak
    if lease.bound:
        ceiling = min(ceiling, lease.ceiling)
    # The guest's word counts where it makes the host more careful.
    ceiling += max(answer.reach - flight.size, 0)
    if answer.potential is not None:
        ceiling = max(ceiling, answer.potential)
    beyond = max(ceiling - peak - flight.size, 0)
    return Lease(
        ceiling, flight.size + image, True, flight.size, None,  # noqa: FBT003
        beyond, answer.potential, answer.sequence, 0, answer.proven, answer.potential is not None,
    )  # fmt: skip


def reported(lease: Lease, potential: int, sequence: int) -> Lease:
    """The lease after a report that is newer than the last answer; while a grant is under way nothing can be told."""
    if not lease.bound or lease.flight is not None or not lease.tells or sequence <= lease.sequence:
        return lease
    raised = max(potential - (lease.ceiling if lease.potential is None else lease.potential), 0)
    return lease if raised == lease.raised else replace(lease, raised=raised)


def highest(lease: Lease) -> int:
    """The size that the image may grow to, whatever of what is under way has arrived."""
    return lease.ceiling + lease.raised


def excess(lease: Lease, image: int) -> int:
    """By how many bytes the image exceeds all that the guest may write; negative while it does not."""
    return image - lease.ceiling - lease.raised


def outstanding(lease: Lease, image: int, size: int) -> int:
    """What a bound guest may still write when its image takes `image` of at most `size`."""
    return max(min(lease.ceiling + lease.raised, size) - image, 0)
