"""How the pool is: levels with hysteresis and a dwell time, how often to look, how much to keep back.

The level is for people, alerts and graded actions; who may write how much never depends on it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from storaged.host.settings import Sharing


class Level(enum.IntEnum):
    """The pool's pressure; worse is greater."""

    NORMAL = 1
    LOW = 2
    CRITICAL = 3


class Zone(enum.Enum):
    """Where the pool's free bytes lie, from scarce to ample."""

    SCARCE = "scarce"  # at or below `critical`
    SCARCE_EDGE = "scarce edge"  # below twice `critical`
    TIGHT = "tight"  # at or below `low`
    TIGHT_EDGE = "tight edge"  # below twice `low`
    AMPLE = "ample"


LEVEL_AFTER: dict[Level, dict[Zone, Level]] = {
    Level.NORMAL: {
        Zone.SCARCE: Level.CRITICAL,
        Zone.SCARCE_EDGE: Level.LOW,
        Zone.TIGHT: Level.LOW,
        Zone.TIGHT_EDGE: Level.NORMAL,
        Zone.AMPLE: Level.NORMAL,
    },
    Level.LOW: {
        Zone.SCARCE: Level.CRITICAL,
        Zone.SCARCE_EDGE: Level.LOW,
        Zone.TIGHT: Level.LOW,
        Zone.TIGHT_EDGE: Level.LOW,
        Zone.AMPLE: Level.NORMAL,
    },
    Level.CRITICAL: {
        Zone.SCARCE: Level.CRITICAL,
        Zone.SCARCE_EDGE: Level.CRITICAL,
        Zone.TIGHT: Level.LOW,
        Zone.TIGHT_EDGE: Level.LOW,
        Zone.AMPLE: Level.NORMAL,
    },
}
"""The table of transitions: level now, zone seen, level that is due."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """The level in force, and the better one that waits."""

    level: Level = Level.NORMAL
    pending: Level | None = None
    pending_since: float = 0.0


def zone(free: int, settings: Sharing) -> Zone:
    """Where `free` bytes lie."""
    if free <= settings.critical:
        return Zone.SCARCE
    if free < 2 * settings.critical:
        return Zone.SCARCE_EDGE
    if free <= settings.low:
        return Zone.TIGHT
    return Zone.TIGHT_EDGE if free < 2 * settings.low else Zone.AMPLE


def sampled(pressure: Pressure, free: int, at: float, settings: Sharing) -> Pressure:
    """A worse level counts at once, a better one when it has lasted."""
    due = LEVEL_AFTER[pressure.level][zone(free, settings)]
    if due >= pressure.level:
        return Pressure(due)
    if pressure.pending is None:
        pressure = replace(pressure, pending=due, pending_since=at)
    pending = max(pressure.pending or due, due)  # the worst of what was seen while it waited
    if at >= pressure.pending_since + settings.dwell_s:
        return Pressure(pending)
    return replace(pressure, pending=pending)


def interval(free: int, rate: float, settings: Sharing) -> float:
    """Seconds until the next look: a share of the time in which `free` bytes are gone at `rate` bytes a second."""
    if rate <= 0:
        return settings.poll_most_s
    left_s = max(free, 0) / rate
    return min(max(left_s / settings.looks, settings.poll_least_s), settings.poll_most_s)


def reserve(outside: float, reaction_s: float, total: int, settings: Sharing) -> int:
    """Bytes to keep back: twice what others on the host write in one reaction, within bounds.

    Half is for the burst itself; out of the other half guests are told to shrink, each of which may first spend
    what it has (see `leases`). It adapts up to a share of the pool's `total` bytes (0: not known).
    """
    most = min(settings.reserve_most, int(settings.reserve_share * total)) if total else settings.reserve_most
    return max(min(2 * int(outside * reaction_s), most), settings.reserve_least)
