"""A wall clock and a time zone in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from storaged.errors import StoragedError
from storaged.guest.clock import NANOS
from storaged.sim.faults import Faults

SETTABLE_S = (1 << 63) // NANOS - 30 * 365 * 24 * 3600
"""The kernel leaves its clock thirty years to run (TIME_SETTOD_SEC_MAX, include/linux/time64.h)."""
ZONES = ("UTC", "Etc/UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata")


class SimWallClock:
    """`guest.clock.ClockPort` that stands still, on a machine that has been up for `uptime_s`."""

    def __init__(self, uptime_s: int = 100) -> None:
        self.nanoseconds = 1_700_000_000 * NANOS
        self._uptime_s = uptime_s

    def set_wall(self, nanoseconds: int) -> None:
        if not self._uptime_s * NANOS <= nanoseconds < SETTABLE_S * NANOS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.nanoseconds = nanoseconds


class SimZones:
    """`guest.clock.ZonePort` of a few well-known zones."""

    def __init__(self, zones: Iterable[str] = ZONES, faults: Faults | None = None) -> None:
        self.zones = frozenset(zones)
        self.local: str | None = None
        self.bound = False
        self.faults = faults or Faults()

    def set_zone(self, name: str, *, bind: bool) -> None:
        if name not in self.zones:
            raise StoragedError(f"timezone_name {name!r}: there is no such time zone")
        self.faults.meet("set_zone")
        self.local, self.bound = name, bind
