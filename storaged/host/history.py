"""What a pool was like: every second for ten minutes, every minute for a day. PURE."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from storaged.host.levels import Level

FINE_S, FINE = 1.0, 600
COARSE_S, COARSE = 60.0, 1440


@dataclass(frozen=True, slots=True)
class Point:
    """The pool at `at`, seconds since the epoch; sizes in bytes."""

    at: float
    free: int
    reserve: int
    promised: int
    level: Level


@dataclass(slots=True)
class History:
    """Points, oldest first; it never grows beyond what is said above."""

    _fine: deque[Point] = field(default_factory=lambda: deque(maxlen=FINE))
    _coarse: deque[Point] = field(default_factory=lambda: deque(maxlen=COARSE))

    def add(self, point: Point) -> None:
        """The newest point; dropped when the last is less than a second old and of the same level."""
        last = self._fine[-1] if self._fine else None
        if last is not None and last.level is point.level and 0 <= point.at - last.at < FINE_S * 0.9:
            return
        self._fine.append(point)
        if not self._coarse or not 0 <= point.at - self._coarse[-1].at < COARSE_S:
            self._coarse.append(point)

    def points(self) -> list[Point]:
        """All of them."""
        since = self._fine[0].at if self._fine else 0.0
        return [point for point in self._coarse if point.at < since] + list(self._fine)
