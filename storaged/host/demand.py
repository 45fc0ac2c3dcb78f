"""What each guest should have: its rate, its want, and the division of what there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from storaged.host.model import Guest
from storaged.host.settings import Sharing

BUSY = 256 * 1024.0
"""Bytes a second from which a guest counts as one that writes."""


def smoothed(rate: float, grew: int, over_s: float, settings: Sharing) -> float:
    """The write rate after the image grew by `grew` bytes: quick to rise, slow to fall. What shrank wrote nothing."""
    if over_s <= 0:
        return rate
    now = max(grew, 0) / over_s
    follows_s = settings.rise_s if now > rate else settings.fall_s
    return rate + (now - rate) * -math.expm1(-over_s / follows_s)


def water_fill(wants: Sequence[int], weights: Sequence[float], room: int) -> list[int]:
    """Weighted max-min: nobody gets more than it wants, and nobody's share per weight can be raised further
    without taking from one whose share per weight is as small."""
    given = [0] * len(wants)
    left, weight_left = room, math.fsum(weights)
    order = sorted(range(len(wants)), key=lambda i: wants[i] / weights[i])
    for place, i in enumerate(order):
        if wants[i] * weight_left > left * weights[i]:
            for j in order[place:]:
                given[j] = min(int(left * weights[j] / weight_left), wants[j])
            break
        given[i] = wants[i]
        left -= wants[i]
        weight_left -= weights[i]
    return given


@dataclass(frozen=True, slots=True)
class Division:
    """What each guest wants and should have, in the order asked; `roomy` when wants take less than half."""

    wants: list[int]
    targets: list[int]
    roomy: bool


def divide(guests: Sequence[Guest], room: int, at: float, settings: Sharing) -> Division:
    """Divide `room` bytes among `guests`: water-filling on what they want, then half of the rest by weight.

    The other half stays for fast grants, as does a share of the whole. No guest gets more than its disk can take, and
    one that is fenced gets nothing. When wants do not fit, guests that do not write want no more than their part of
    `idle_share`: else the last gigabytes would lie with those who sleep.
    """
    if not guests:
        return Division([], [], roomy=True)
    room = int(max(room, 0) * (1 - settings.kept_share))
    most = [0 if at < guest.fenced_until else guest.usable for guest in guests]
    weights = [guest.weight for guest in guests]
    horizon_s = settings.horizon_roomy_s
    wants = [min(_want(guest, settings.base, horizon_s, at), can) for guest, can in zip(guests, most, strict=True)]
    if roomy := 2 * sum(wants) <= room:
        shares = wants
    else:
        base = min(settings.base, int(room * settings.idle_share / len(guests)))
        wants = [
            min(_want(guest, base if guest.rate < BUSY else settings.base, settings.horizon_s, at), can)
            for guest, can in zip(guests, most, strict=True)
        ]
        shares = water_fill(wants, weights, room)
    rest = (room - sum(shares)) / 2 / math.fsum(weights)
    targets = [
        min(share + max(int(rest * weight), 0), can) for share, weight, can in zip(shares, weights, most, strict=True)
    ]
    return Division(wants, targets, roomy)


def _want(guest: Guest, base: int, horizon_s: float, at: float) -> int:
    want = base + int(guest.rate * horizon_s)
    return max(want, guest.left + guest.pleads) if at < guest.pleads_until else want
