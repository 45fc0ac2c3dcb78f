"""Which guests are told something else now: growth out of what nobody was promised, shrinking where that is short."""

from __future__ import annotations

from dataclasses import dataclass

from storaged.host.demand import Division, divide
from storaged.host.model import Guest, Presence, State, charge
from storaged.units import sector_floor

FIRST_PART = 8
"""A guest that is bound and has not answered yet is sent this part of `base` at most."""


@dataclass(slots=True)
class _Claim:
    """A guest's part in one decision. `held` is what it may still write at most, `has` what it likely may.

    Both without what no grant can take from it (`Lease.beyond`): that is fixed, as are others' holdings.
    """

    guest: Guest
    held: int
    has: int
    want: int = 0
    target: int = 0
    free_to_move: bool = True

    @property
    def urgent(self) -> bool:
        """It is close to empty, or asks."""
        return 4 * self.has < self.want or self.guest.pleads > 0


@dataclass(slots=True)
class _Purse:
    """What can still be promised; every grant costs its whole size until it is acknowledged (see `leases`)."""

    left: int
    sends: list[tuple[str, int]]

    def send(self, claim: _Claim, size: int) -> None:
        self.left -= size
        self.sends.append((claim.guest.name, size))
        claim.free_to_move = False


def decide(state: State, at: float) -> list[tuple[str, int]]:
    """Grants to send now, in this order. Keeps the promises within free less reserve, if they are."""
    settings, pool = state.settings, state.pool
    claims, mute, fixed, settling, promised = _claims(state, at)
    slack = pool.free - pool.reserve - promised
    if not pool.whole and slack >= 0:
        return []  # somebody's image is not in this epoch: what looks free may be spent
    asked = sum(guest.claim_lacks for guest in state.guests.values())
    room = pool.free - pool.reserve - fixed - asked
    division = divide([claim.guest for claim in claims], room, at, settings)
    for claim, want, target in zip(claims, division.wants, division.targets, strict=True):
        # One that is bound and has not answered yet may never do so: what it was sent would be lost to all others.
        met = claim.guest.presence is not Presence.DISCOVERED or not claim.guest.lease.bound
        claim.want, claim.target = want, target if met else min(target, settings.base // FIRST_PART)
    purse = _Purse(slack, [])
    keep = int(max(room, 0) * settings.kept_share)
    _ask_again(mute, purse, min(settings.base, keep // max(len(mute), 1)), at)
    _bind(claims, purse)
    _tell_again(claims, purse)
    _fence(claims, purse, at)
    unmet = _grow(state, [claim for claim in claims if claim.urgent], division, purse, asked)
    short = keep + asked + unmet - settling - purse.left
    if short > 0:
        if slack < 0:
            # Half of the reserve is there to shrink with.
            purse.left = max(purse.left + pool.reserve // 2, 0)
        _shrink(state, claims, division, purse, short, settings.least - slack if slack < 0 else 0)
    if slack > 0 and purse.left > keep + asked:
        _grow(state, [claim for claim in claims if not claim.urgent], division, purse, keep + asked)
    return purse.sends


def _claims(state: State, at: float) -> tuple[list[_Claim], list[_Claim], int, int, int]:
    """Who can be given and taken from; who is to be asked again; what others hold; what comes back when flights end;
    all of it."""
    claims: list[_Claim] = []
    mute: list[_Claim] = []
    fixed = settling = promised = 0
    for guest in state.guests.values():
        if not guest.runs:
            continue
        held = charge(guest, state.settings)
        promised += held
        lease = guest.lease
        flight = lease.flight
        hangs = guest.presence is Presence.HANGING and (flight or at < guest.retry_at)
        kept = min(lease.beyond + lease.raised + guest.claim + int(guest.overran), held)
        if hangs or guest.presence is Presence.SUSPENDED:
            fixed += held
        elif guest.mute:
            fixed += held
            if flight is None and at >= guest.retry_at:
                mute.append(_Claim(guest, held, held))
        elif flight:
            kept = min(kept, max(held - flight.size, 0))
            fixed += kept
            settling += max(held - flight.size - kept, 0)
            claims.append(_Claim(guest, flight.size, flight.size, free_to_move=False))
        else:
            fixed += kept
            held -= kept
            claims.append(_Claim(guest, held, min(held, guest.likely), free_to_move=at >= guest.retry_at))
    return claims, mute, fixed, settling, promised


def _ask_again(mute: list[_Claim], purse: _Purse, most: int, at: float) -> None:
    """Guests that have never answered are asked with little, all of them together: it may never be taken up."""
    for claim in mute:
        already = max(claim.guest.lease.ceiling - claim.guest.image, 0)
        size = 0 if at < claim.guest.fenced_until else min(most - already, claim.guest.usable, purse.left)
        purse.send(claim, sector_floor(max(size, 0)))


def _tell_again(claims: list[_Claim], purse: _Purse) -> None:
    """Guests whose last call failed are told what they have once more, and nothing from the second time on.

    What a call may have brought to a guest that does not answer counts on top each time: only nothing costs nothing.
    Those that answered that they cannot get there are told their share: preallocated files may fit into that.
    """
    for claim in claims:
        guest = claim.guest
        if not claim.free_to_move or not guest.failures or not guest.lease.bound:
            continue
        if guest.presence is Presence.UP:
            size = claim.target
        elif guest.failures > 1 or guest.presence is Presence.DISCOVERED:
            size = 0
        else:
            size = min(claim.target, claim.held)
        purse.send(claim, sector_floor(max(min(size, purse.left), 0)))


def _fence(claims: list[_Claim], purse: _Purse, at: float) -> None:
    """What a guest still holds that exceeded its grant is taken from it."""
    for claim in claims:
        if claim.free_to_move and at < claim.guest.fenced_until and claim.held:
            purse.send(claim, 0)


def _bind(claims: list[_Claim], purse: _Purse) -> None:
    """Whoever knows no bound is told one first, even if it is nothing."""
    for claim in claims:
        if claim.free_to_move and not claim.guest.lease.bound:
            purse.send(claim, sector_floor(max(min(claim.target, purse.left), 0)))


def _grow(state: State, claims: list[_Claim], division: Division, purse: _Purse, keep: int) -> int:
    """Raise those who are below their target, the emptiest first; returns how much they lack in the end."""
    unmet = 0
    for claim in sorted(claims, key=lambda claim: claim.has / max(claim.want, 1)):
        band = state.settings.least if claim.urgent else _band(claim.target, division, state)
        if not claim.free_to_move or claim.target - claim.has < band:
            continue
        size = sector_floor(max(min(claim.target, purse.left - keep), 0))
        if size - claim.has >= band:
            purse.send(claim, size)
        unmet += claim.target - max(size, claim.has)
    return unmet


def _shrink(state: State, claims: list[_Claim], division: Division, purse: _Purse, short: int, missing: int) -> None:
    """Get `short` bytes from those who hold most above their target; what can be paid for may be less than that.

    `missing` of them were promised and are not there. For those even who is within the band is called, and gives that
    much and no more: else a promise that is broken by a little would stay broken.
    """
    for claim in sorted(claims, key=lambda claim: claim.held - claim.target, reverse=True):
        over = claim.held - claim.target
        if not claim.free_to_move or over <= 0:
            continue
        if over >= _band(claim.target, division, state):
            size = claim.target
        elif missing > 0:
            size = max(claim.target, claim.held - missing)
        else:
            continue
        size = sector_floor(min(size, purse.left))
        purse.send(claim, size)
        short -= claim.held - size
        missing -= claim.held - size
        if short <= 0:
            return


def _band(target: int, division: Division, state: State) -> int:
    settings = state.settings
    return (
        int(target * settings.band_roomy) if division.roomy else max(int(target * settings.band), settings.band_least)
    )
