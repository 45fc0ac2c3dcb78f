"""Host pressure: from what the host reports to a level, with hysteresis and a settle time.

The free bytes fall into one of five zones, cut by the two pairs of enter and leave values. A worse level
counts at once. A better one counts after it has lasted for the settle time: a host at the edge must not make
the guest trim and re-tune its write-back every second.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from storaged.core.model import Config, HostReport, Level, Told


class Zone(enum.Enum):
    """Where the host's free bytes lie, from scarce to ample."""

    SCARCE = "scarce"  # at or below the value that enters CRITICAL
    SCARCE_EDGE = "scarce edge"  # not yet enough to leave CRITICAL
    TIGHT = "tight"  # at or below the value that enters LOW
    TIGHT_EDGE = "tight edge"  # not yet enough to leave LOW
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
"""The table of transitions: level now, zone reported, level that is due."""

AT_LEAST: dict[Told, Level] = {
    Told.NORMAL: Level.NORMAL,
    Told.LOW: Level.LOW,
    Told.CRITICAL: Level.CRITICAL,
}
"""A host that names a state is never believed to be better off than it says."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """The level in force, and the better one that waits (`pending`, since `pending_since`)."""

    level: Level = Level.NORMAL
    known: bool = False
    pending: Level | None = None
    pending_since: float = 0.0


def carries_no_news(report: HostReport) -> bool:
    """True when the host does not know: its own statvfs failed, and nothing may change."""
    return report.told is Told.NONE or report.free < 0


def zone(free: int, config: Config) -> Zone:
    """Where `free` bytes lie between the configured values."""
    if free <= config.critical_enter:
        return Zone.SCARCE
    if free < config.critical_leave:
        return Zone.SCARCE_EDGE
    if free <= config.low_enter:
        return Zone.TIGHT
    if free < config.low_leave:
        return Zone.TIGHT_EDGE
    return Zone.AMPLE


def due(level: Level, report: HostReport, config: Config) -> Level:
    """The level this report asks for, before any settle time."""
    return max(LEVEL_AFTER[level][zone(report.free, config)], AT_LEAST[report.told])


def says_critical(report: HostReport | None, config: Config) -> bool:
    """True when the host's last report, by itself, is of a disk that is critically full.

    At exactly `critical_enter` the host's word decides: who shares a disk adds its own reserve to a share of nothing.
    """
    return report is not None and (report.told is Told.CRITICAL or report.free < config.critical_enter)


def reported(pressure: Pressure, report: HostReport, config: Config) -> Pressure:
    """Pressure after a host report that carries news."""
    wanted = due(pressure.level, report, config)
    if wanted >= pressure.level:
        return Pressure(wanted, known=True)
    if pressure.pending is None:
        return settled(replace(pressure, known=True, pending=wanted, pending_since=report.at), report.at, config)
    # Waiting goes on for the worst of what was seen meanwhile.
    return settled(replace(pressure, pending=max(pressure.pending, wanted)), report.at, config)


def settled(pressure: Pressure, now: float, config: Config) -> Pressure:
    """Pressure after time has passed: a better level that lasted comes into force."""
    if pressure.pending is None or now < pressure.pending_since + config.settle_s:
        return pressure
    return replace(pressure, level=pressure.pending, pending=None, pending_since=0.0)


def settles_at(pressure: Pressure, config: Config) -> float | None:
    """When `settled` next has something to do; None when nothing waits."""
    return None if pressure.pending is None else pressure.pending_since + config.settle_s
