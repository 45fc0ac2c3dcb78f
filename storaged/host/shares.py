"""Who may have how much: `step(state, event) -> (state, effects)`.

The rules, in prose:

1. What guests may still write, all together, is at most what is free less the reserve. A guest's write lowers both
   sides alike, so this stays true whatever guests do; only others on the host can break it. Then the shrinking
   starts with the same event, and a note says so.
2. A guest is believed nothing that would make the host careless: see `leases`. One that does not answer, or sleeps,
   keeps what it was promised until its machine has ended.
3. One change is under way per guest. Growth is paid from what nobody was promised, never from what somebody was
   merely told to give back.
4. Grants are decided at an epoch, a plea, a coming or going, or when a try is due; never on a lone reading of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from storaged.host import events as ev
from storaged.host import leases, levels
from storaged.host.decide import decide
from storaged.host.demand import smoothed
from storaged.host.model import RUNNING, Guest, Pool, Presence, Settled, State, books, established
from storaged.host.settings import Sharing
from storaged.units import format_size

Result = tuple[State, tuple[ev.Effect, ...]]


def step(state: State, event: ev.Event) -> Result:
    """The state after `event`, and what is to be done, in this order."""
    return HANDLERS[type(event)](state, event)


def next_wakeup(state: State) -> float | None:
    """When a Tick next has something to do; None while nothing waits for time."""
    times = []
    decided_at = -math.inf if state.pool.at is None else state.pool.at
    for guest in state.guests.values():
        flight = guest.lease.flight
        if flight is not None and flight.acked_at is None and guest.presence in {Presence.UP, Presence.DISCOVERED}:
            times.append(flight.sent_at + state.settings.answer_s)
        elif flight is None and guest.failures and guest.runs and guest.retry_at > decided_at:
            times.append(guest.retry_at)
    return min(times, default=None)


# --- what the rest is made of ---------------------------------------------------------------------------------


def _holding(guest: Guest, lease: leases.Lease) -> Guest:
    return Guest(
        guest.name, guest.size, guest.image, guest.seen_at, guest.weight, guest.presence, lease, guest.counted,
        guest.rate, guest.pleads, guest.pleads_until, guest.failures, guest.retry_at, guest.overran, guest.overruns,
        guest.fenced_until, guest.claim, guest.claim_asked, guest.over_since, guest.restarted_at,
    )  # fmt: skip  # written out: `replace` costs three times as much, and a thousand guests may be told at once


def _with(state: State, guest: Guest) -> State:
    return replace(state, guests={**state.guests, guest.name: guest})


def _judged(state: State) -> Result:
    """Say when the invariant comes to hold or ceases to."""
    if state.pool.at is None or not state.pool.whole:
        return state, ()
    holds = established(state)
    if holds is state.holds:
        return state, ()
    account = books(state)
    text = (
        f"promised {format_size(account.promised + account.unbound)} "
        f"of {format_size(account.free)} free less {format_size(account.reserve)} reserve"
    )
    if holds:
        note = ev.Note(ev.Topic.RESTORED, f"all that guests may write is there: {text}")
    else:
        note = ev.Note(ev.Topic.BROKEN, f"guests may write more than there is: {text}{_doubts(state)}", warning=True)
    return replace(state, holds=holds), (note, ev.Publish())


def _doubts(state: State) -> str:
    """Guests that may write more than is known, for a note."""
    unbound = sum(guest.runs and not guest.lease.bound for guest in state.guests.values())
    unproven = sum(guest.runs and guest.lease.bound and not guest.lease.proven for guest in state.guests.values())
    told = [f"{unbound} with no bound"] if unbound else []
    told += [f"{unproven} whose agents tell nothing of preallocated files"] if unproven else []
    doubts = f"; guests: {', '.join(told)}" if told else ""
    # One that says so of itself takes all others' room: the word is its own, so its name is told.
    beyond = {name: _beyond(guest) for name, guest in state.guests.items() if guest.runs and guest.lease.bound}
    most = max(beyond, key=lambda name: beyond[name], default=None)
    if most is not None and beyond[most] >= max(state.pool.free // 8, state.settings.overrun):
        what = "room for metadata, preallocated files, as it says itself"
        doubts += f"; most beyond its grant: {most}, {format_size(beyond[most])} ({what})"
    return doubts


def _beyond(guest: Guest) -> int:
    return leases.outstanding(guest.lease, guest.image, guest.size) - guest.lease.granted


def _shared(state: State, at: float) -> Result:
    """Judge, then send what is to be sent."""
    if state.pool.at is None:
        return state, ()
    state, effects = _judged(_claimed(state))
    sends = decide(state, at)
    if not sends:
        return _settled(state), effects
    guests = dict(state.guests)
    seq = state.seq
    grants: list[ev.Effect] = []
    for name, size in sends:
        seq += 1
        guest = guests[name]
        guests[name] = _holding(guest, leases.sent(guest.lease, guest.image, seq, size, at))
        grants.append(ev.SetGrant(name, size, seq))
    return replace(state, guests=guests, seq=seq), (*effects, *grants, ev.Publish())


def _settled(state: State) -> State:
    """The state, in which nothing is to be done until something but the time has changed, if that is so."""
    pool = state.pool
    quiet = pool.whole and all(guest.still for guest in state.guests.values() if guest.runs)
    if not quiet or books(state).slack < state.settings.least:
        return state
    return replace(state, settled=Settled(state.guests, pool.free, pool.reserve))


def _claimed(state: State) -> State:
    """Set aside what was asked for, where it is there by now."""
    asking = [guest for guest in state.guests.values() if guest.claim_lacks]
    if not asking or not state.pool.whole:
        return state
    guests, slack = dict(state.guests), books(state).slack
    for guest in asking:
        if guest.claim_lacks <= slack:
            slack -= guest.claim_lacks
            guests[guest.name] = replace(guest, claim=guest.claim_asked, claim_asked=0)
    return replace(state, guests=guests)


def _read(guest: Guest, image: int, at: float, state: State, counted: int | None) -> tuple[Guest, ev.Note | None]:
    """The guest after its image was read."""
    settings = state.settings
    # A guest that stood still was not looked at, and its image was as it is until the epoch.
    over_s = at - max(guest.seen_at, state.pool.at or 0.0)
    # What a resize moves is not what the guest writes.
    grew = image - guest.image if not guest.claim else min(image - guest.image, 0)
    rate = smoothed(guest.rate, grew, over_s, settings)
    rate = rate if rate >= 1 else 0.0
    lease = leases.seen(guest.lease, image, at)
    overran, note = guest.overran, None
    overruns, fenced_until = guest.overruns, guest.fenced_until
    if overran:
        overran = 0.0 if overran < settings.least else overran * 0.5 ** (max(over_s, 0.0) / settings.worst_half_s)
    excess = leases.excess(lease, image) - guest.claim
    over_since = guest.over_since
    if not lease.bound or excess <= settings.overrun:
        over_since = 0.0
    elif not over_since or (lease.flight is not None and lease.tells):
        over_since = at  # a report, or an answer, that explains it may be under way
    if over_since and (not lease.tells or at - over_since >= settings.overrun_s):
        over_since = 0.0
        overran = max(overran, float(excess))
        overruns += 1
        fenced_until = at + settings.fence_s
        lease = replace(lease, bound=False)
        note = _overrun(guest.name, excess, settings)
    elif fenced_until and at >= fenced_until:
        fenced_until = 0.0
        note = ev.Note(ev.Topic.FENCE, f"{guest.name} kept within its grant and gets a share again", guest.name)
    pleads, pleads_until = (guest.pleads, guest.pleads_until) if at < guest.pleads_until else (0, 0.0)
    read = Guest(
        guest.name, guest.size, image, at, guest.weight, guest.presence, lease, counted, rate, pleads,
        pleads_until, guest.failures, guest.retry_at, overran, overruns, fenced_until, guest.claim,
        guest.claim_asked, over_since, guest.restarted_at,
    )  # fmt: skip  # written out: `replace` costs three times as much, and this runs for every guest at every look
    return read, note


# --- events ---------------------------------------------------------------------------------------------------


def _pool_sampled(state: State, event: ev.PoolSampled) -> Result:
    pool, settings, images = state.pool, state.settings, event.images
    if pool.at is not None and event.at < pool.at:
        return state, ()
    guests: dict[str, Guest] = {}
    effects: list[ev.Effect] = []
    whole, same, still = True, pool.whole, True
    grew = 0
    for name, guest in state.guests.items():
        image = images.get(name) if guest.presence in RUNNING else None
        if image is None:
            whole = whole and not guest.runs
            guests[name] = guest
            continue
        if image == guest.image == guest.counted and guest.still:
            guests[name] = guest
            continue
        still = False
        if guest.counted is None:
            same = False
        else:
            grew += image - guest.counted
        guests[name], note = _read(guest, image, max(event.at, guest.seen_at), state, image)
        if note is not None:
            effects.append(note)
    pool = _measured(pool, event, grew if same and whole else None, settings)
    pressure = levels.sampled(pool.pressure, event.free, event.at, settings)
    if pressure.level is not pool.pressure.level:
        text = f"{pressure.level.name}: {format_size(event.free)} free"
        effects += [
            ev.Note(ev.Topic.LEVEL, text, warning=pressure.level > pool.pressure.level),
            ev.Publish(),
        ]
    writes = sum(guest.rate for guest in guests.values() if guest.runs)
    interval_s = levels.interval(event.free, max(pool.falls, pool.outside + writes), settings)
    total = event.total or pool.total
    reserve = levels.reserve(pool.outside, interval_s + pool.answer_s, total, settings)
    pool = replace(
        pool,
        free=event.free,
        at=event.at,
        total=total,
        whole=whole,
        reserve=reserve,
        interval_s=interval_s,
        pressure=pressure,
    )
    if still and whole and _stays(state, pool):
        return replace(state, pool=pool), (*effects, ev.Poll(interval_s))
    state, shared = _shared(replace(state, pool=pool, guests=guests), event.at)
    return state, (*effects, *shared, ev.Poll(interval_s))


def _stays(state: State, pool: Pool) -> bool:
    """Nothing is to be done at `pool` either: it is as good as the same."""
    was = state.settled
    if was is None or was.guests is not state.guests or was.reserve != pool.reserve:
        return False
    return abs(pool.free - was.free) < state.settings.least


def _measured(pool: Pool, event: ev.PoolSampled, grew: int | None, settings: Sharing) -> Pool:
    """What two epochs tell: others wrote what is missing from free and is in no image. `grew` None: unknown."""
    if pool.at is None or event.at - pool.at < 0.01:
        return pool
    over_s = event.at - pool.at
    fell = pool.free - event.free
    fades = 0.5 ** (over_s / settings.worst_half_s)
    outside = pool.outside * fades
    if grew is not None:
        # Over less than the longest time between two looks, a burst would count as a rate.
        outside = max(outside, (fell - grew) / max(over_s, settings.poll_most_s))
    falls = smoothed(pool.falls, fell, over_s, settings)
    return replace(pool, outside=outside, falls=falls, answer_s=pool.answer_s * fades)


def _guest_joined(state: State, event: ev.GuestJoined) -> Result:
    guest = Guest(
        event.guest,
        event.size,
        event.image,
        event.at,
        event.weight,
        Presence.DISCOVERED if event.running else Presence.CONFIGURED,
        leases.kept(event.image, event.keeps, event.ceiling),
    )
    if (was := state.guests.get(event.guest)) is not None:
        guest = replace(
            guest, overran=was.overran, overruns=was.overruns, fenced_until=was.fenced_until, claim=was.claim,
            claim_asked=was.claim_asked, restarted_at=was.restarted_at,
        )  # fmt: skip
    state = _with(state, guest)
    if not event.running:
        return state, (ev.Publish(),)
    state = replace(state, pool=replace(state.pool, whole=False))
    return state, (ev.Publish(), ev.Poll(0.0))


def _guest_changed(state: State, event: ev.GuestChanged) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None:
        return state, ()
    weight = guest.weight if event.weight is None else event.weight
    size = guest.size if event.size is None else event.size
    return _shared(_with(state, replace(guest, weight=weight, size=size)), event.at)


def _guest_restarted(state: State, event: ev.GuestRestarted) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or not guest.runs:
        return state, ()
    lease, again = guest.lease, event.at - guest.restarted_at < state.settings.restart_s and guest.restarted_at > 0
    excess = leases.excess(lease, guest.image) - guest.claim
    if again and lease.bound:
        # One that starts all the time stays bound by what it had: else it could have its debts forgotten.
        if lease.flight is not None:
            lease = leases.failed(lease, lease.flight.seq, certain=False)
        guest = replace(guest, lease=lease, failures=max(guest.failures, 1), retry_at=event.at)
        state, effects = _shared(_with(state, guest), event.at)
        return state, effects
    notes: tuple[ev.Note, ...] = ()
    if lease.bound and excess > state.settings.overrun:
        guest = replace(
            guest,
            overran=max(guest.overran, float(excess)),
            overruns=guest.overruns + 1,
            over_since=0.0,
            fenced_until=event.at + state.settings.fence_s,
        )
        notes = (_overrun(guest.name, excess, state.settings),)
    # The ceiling stays as the least that is charged.
    lease = leases.Lease(lease.ceiling + lease.raised, granted=lease.granted)
    guest = replace(guest, lease=lease, presence=Presence.DISCOVERED, failures=0, retry_at=0.0, restarted_at=event.at)
    state, effects = _shared(_with(state, guest), event.at)
    return state, (*notes, ev.Publish(), *effects)


def _overrun(name: str, excess: int, settings: Sharing) -> ev.Note:
    text = (
        f"{name} wrote {format_size(excess)} more than it was granted; it is granted nothing for {settings.fence_s:g} s"
    )
    return ev.Note(ev.Topic.OVERRUN, text, name, warning=True)


def _guest_left(state: State, event: ev.GuestLeft) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None:
        return state, ()
    guests = dict(state.guests)
    if event.forget:
        del guests[event.guest]
    else:
        guests[event.guest] = replace(
            guest, presence=Presence.GONE, lease=leases.Lease(), counted=None, rate=0.0, pleads=0
        )
    # What it wrote since the epoch is not in `free` yet: nothing grows before the next one.
    pool = replace(state.pool, whole=False)
    return replace(state, guests=guests, pool=pool), (ev.Publish(), ev.Poll(0.0))


def _guest_sampled(state: State, event: ev.GuestSampled) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or not guest.runs or event.at < guest.seen_at:
        return state, ()
    flew = guest.lease.flight is not None
    guest, note = _read(guest, event.image, event.at, state, guest.counted)
    effects: list[ev.Effect] = [] if note is None else [note]
    if flew and guest.lease.flight is None:
        effects.append(ev.Poll(min(state.settings.poll_soon_s, state.pool.interval_s)))
    return _with(state, guest), tuple(effects)


def _grant_acked(state: State, event: ev.GrantAcked) -> Result:
    return _acked(state, (event,))


def _grants_acked(state: State, event: ev.GrantsAcked) -> Result:
    return _acked(state, event.acks)


def _acked(state: State, acks: Sequence[ev.GrantAcked]) -> Result:
    guests, slowest_s = dict(state.guests), 0.0
    settles, news = False, []
    for ack in acks:
        guest = guests.get(ack.guest)
        if guest is None or guest.lease.flight is None or guest.lease.flight.seq != ack.seq:
            continue  # too late to count: a newer one is under way, or it had failed
        settles = True
        slowest_s = max(slowest_s, ack.at - guest.lease.flight.sent_at)
        lease = leases.acked(guest.lease, ack.seq, ack.answer, ack.at)
        presence = guest.presence if guest.presence is Presence.SUSPENDED else Presence.UP
        if ack.refused:
            guests[guest.name], said = _refused(replace(guest, lease=lease, presence=presence), ack, state.settings)
            news += said
            continue
        if not ack.answer.proven and guest.lease.proven:
            news.append(_unproven(guest))
        if presence is guest.presence and not guest.failures:
            guests[guest.name] = _holding(guest, lease)
            continue
        if presence is not guest.presence:
            news.append(ev.Note(ev.Topic.GUEST, f"{guest.name} answers", guest.name))
        guests[guest.name] = replace(guest, lease=lease, presence=presence, failures=0, retry_at=0.0)
    if not settles:
        return state, ()
    # A guest that hung is no measure of how fast the others shrink.
    slowest_s = min(slowest_s, state.settings.answer_s)
    pool = replace(state.pool, answer_s=1.1 * slowest_s) if slowest_s > state.pool.answer_s else state.pool
    state = State(state.settings, pool, guests, state.seq, state.holds)
    poll = ev.Poll(min(state.settings.poll_soon_s, state.pool.interval_s))
    return state, (*news, *((ev.Publish(),) if news else ()), poll)


def _refused(guest: Guest, ack: ev.GrantAcked, settings: Sharing) -> tuple[Guest, list[ev.Note]]:
    """It answered that it cannot get there, and where it is: it is asked again later, and said once."""
    guest, said = _try_later(guest, ack.at, settings), []
    if guest.failures == 1:
        text = f"{guest.name} cannot keep to its grant: {ack.refused}"
        said.append(ev.Note(ev.Topic.GUEST, text, guest.name, warning=True))
    return guest, said


def _unproven(guest: Guest) -> ev.Note:
    text = (
        f"the agent of {guest.name} does not tell what is preallocated in the guest: more than its grant may be"
        " written; trust_balloon = true takes its word"
    )
    return ev.Note(ev.Topic.GUEST, text, guest.name, warning=True)


def _try_later(guest: Guest, at: float, settings: Sharing) -> Guest:
    wait_s = min(settings.retry_first_s * 2 ** min(guest.failures, 16), settings.retry_most_s)
    return replace(guest, failures=guest.failures + 1, retry_at=at + wait_s)


def _grant_failed(state: State, event: ev.GrantFailed) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or guest.lease.flight is None or guest.lease.flight.seq != event.seq:
        return state, ()
    silent = guest.presence is Presence.UP
    guest = replace(
        _try_later(guest, event.at, state.settings),
        lease=leases.failed(guest.lease, event.seq, certain=event.certain),
        presence=Presence.HANGING if silent else guest.presence,
    )
    text = f"{guest.name} could not be told its grant: {event.reason}"
    return _with(state, guest), (ev.Note(ev.Topic.GUEST, text, guest.name, warning=silent), ev.Publish())


def _potential_reported(state: State, event: ev.PotentialReported) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or not guest.runs:
        return state, ()
    lease = leases.reported(guest.lease, event.potential, event.sequence)
    if lease is guest.lease:
        return state, ()
    state = _with(state, _holding(guest, lease))
    return _shared(state, event.at)


def _claim_set(state: State, event: ev.ClaimSet) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or event.size == (guest.claim_asked or guest.claim):
        return state, ()
    lease = guest.lease
    if not event.size and lease.bound:
        # What was moved and is not discarded yet was not written by the guest.
        lease = replace(lease, ceiling=max(lease.ceiling, guest.image - lease.raised))
    claim, asked = min(guest.claim, event.size), event.size if event.size > guest.claim else 0
    state = _with(state, replace(guest, claim=claim, claim_asked=asked, lease=lease))
    state, effects = _shared(state, event.at)
    return state, (ev.Publish(), *effects)


def _fence_lifted(state: State, event: ev.FenceLifted) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or not guest.fenced_until:
        return state, ()
    state = _with(state, replace(guest, fenced_until=0.0, overran=0.0))
    note = ev.Note(ev.Topic.FENCE, f"{guest.name} gets a share again: an operator said so", guest.name)
    state, effects = _shared(state, event.at)
    return state, (note, ev.Publish(), *effects)


def _guest_silent(state: State, event: ev.GuestSilent) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or guest.presence is not Presence.UP:
        return state, ()
    return _hangs(state, guest, event.at)


def _hangs(state: State, guest: Guest, at: float) -> Result:
    wait_s = state.settings.retry_first_s
    guest = replace(guest, presence=Presence.HANGING, failures=max(guest.failures, 1), retry_at=at + wait_s)
    note = ev.Note(ev.Topic.GUEST, f"{guest.name} does not answer and keeps its grant", guest.name, warning=True)
    return _with(state, guest), (note, ev.Publish())


def _room_asked(state: State, event: ev.RoomAsked) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or not guest.runs:
        return state, ()
    until = event.at + state.settings.plea_s
    state = _with(state, replace(guest, pleads=max(event.size, 0), pleads_until=until))
    return _shared(state, event.at)


def _suspended(state: State, event: ev.Suspended) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or not guest.runs:
        return state, ()
    return _with(state, replace(guest, presence=Presence.SUSPENDED, rate=0.0, pleads=0)), (ev.Publish(),)


def _resumed(state: State, event: ev.Resumed) -> Result:
    guest = state.guests.get(event.guest)
    if guest is None or guest.presence is not Presence.SUSPENDED:
        return state, ()
    presence = Presence.UP if guest.lease.bound else Presence.DISCOVERED
    state = _with(state, replace(guest, presence=presence))
    state, effects = _shared(state, event.at)
    return state, (ev.Publish(), *effects)


def _tick(state: State, event: ev.Tick) -> Result:
    effects: list[ev.Effect] = []
    due = False
    for guest in tuple(state.guests.values()):
        flight = guest.lease.flight
        if flight is None:
            due = due or (guest.failures > 0 and guest.runs and event.at >= guest.retry_at)
        elif (
            flight.acked_at is None
            and guest.presence in {Presence.UP, Presence.DISCOVERED}
            and event.at >= flight.sent_at + state.settings.answer_s
        ):
            state, said = _hangs(state, guest, event.at)
            effects += said
    if not due:
        return state, tuple(effects)
    state, shared = _shared(state, event.at)
    return state, (*effects, *shared)


HANDLERS: dict[type[ev.Event], Callable[[State, Any], Result]] = {
    ev.PoolSampled: _pool_sampled,
    ev.GuestJoined: _guest_joined,
    ev.GuestChanged: _guest_changed,
    ev.GuestRestarted: _guest_restarted,
    ev.GuestLeft: _guest_left,
    ev.GuestSampled: _guest_sampled,
    ev.GrantAcked: _grant_acked,
    ev.GrantsAcked: _grants_acked,
    ev.GrantFailed: _grant_failed,
    ev.PotentialReported: _potential_reported,
    ev.ClaimSet: _claim_set,
    ev.FenceLifted: _fence_lifted,
    ev.GuestSilent: _guest_silent,
    ev.RoomAsked: _room_asked,
    ev.Suspended: _suspended,
    ev.Resumed: _resumed,
    ev.Tick: _tick,
}
