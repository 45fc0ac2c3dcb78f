"""The host's metrics: every pool, every guest, as the controllers believe them to be. Names are a contract."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from storaged.host import families as f
from storaged.host.controller import Controller
from storaged.host.levels import Level
from storaged.host.model import Presence, State, books
from storaged.host.watch import allocated, capacity
from storaged.metrics.family import PLAIN, Distribution, Family, Metric, one_hot

Numbers = dict[tuple[str, ...], float]


@dataclass(slots=True)
class _Watched:
    """One pool, and what was counted on the way."""

    controller: Controller
    level: Level = Level.NORMAL
    crossed_at: float | None = None
    free: int = 0
    granted: dict[str, int] = field(default_factory=dict)


class HostCollector:
    """Made on the event loop; collected from any thread: what it reads is frozen."""

    families = f.HOST

    def __init__(self, controllers: Sequence[Controller]) -> None:
        self._pools = [_Watched(controller) for controller in controllers]
        self._rebalances: Counter[str] = Counter(dict.fromkeys(f.REASONS, 0))
        self._reactions = [0] * (len(f.BUCKETS) + 1)
        self._reacted_s = 0.0
        for pool in self._pools:
            pool.controller.observe(lambda state, pool=pool: self._observe(pool, state))  # type: ignore[misc]

    def _observe(self, pool: _Watched, state: State) -> None:
        granted = {name: guest.lease.granted for name, guest in state.guests.items() if guest.lease.bound}
        if granted != pool.granted:
            moved = state.pool.free - pool.free
            reason = f.GUESTS if not pool.granted or not moved else f.FELL if moved < 0 else f.ROSE
            self._rebalances[reason] += 1
            pool.granted, pool.free = granted, state.pool.free
        level = state.pool.pressure.level
        if level > pool.level:
            pool.crossed_at = time.monotonic()
        pool.level = level
        waiting = any(guest.lease.flight and guest.presence is Presence.UP for guest in state.guests.values())
        if pool.crossed_at is not None and not waiting:
            took = time.monotonic() - pool.crossed_at
            self._reactions[bisect_left(f.BUCKETS, took)] += 1
            self._reacted_s += took
            pool.crossed_at = None

    def collect(self) -> Iterator[Metric]:
        """One family after the other, in the contract's order."""
        values: dict[str, Numbers] = {family.name: {} for family in f.HOST}
        for watched in self._pools:
            _pool(watched, values)
            _guests(watched, values)
        values[f.REBALANCES.name] = {(reason,): count for reason, count in self._rebalances.items()}
        for family in f.HOST:
            if family is f.REACTION:
                seen = Distribution(f.BUCKETS, list(self._reactions), self._reacted_s)
                yield Metric(family, {PLAIN: seen})
            else:
                yield Metric(family, values[family.name])


def _pool(watched: _Watched, values: dict[str, Numbers]) -> None:
    name, state = watched.controller.pool.name, watched.controller.state
    known: dict[Family, float] = {f.POOL_SIZE: _size(watched.controller.pool.path)}
    level = f.UNREAD
    if state.pool.at is not None:
        account = books(state)
        known |= {f.POOL_FREE: account.free, f.POOL_RESERVE: account.reserve, f.POOL_PROMISED: account.set_aside}
        level = state.pool.pressure.level.name.lower()
    for family, value in known.items():
        values[family.name][name,] = value
    values[f.PRESSURE.name] |= one_hot(f.LEVELS, level, name)


def _guests(watched: _Watched, values: dict[str, Numbers]) -> None:
    guests = watched.controller.state.guests
    for name, member in watched.controller.members.copy().items():
        guest = guests.get(name)
        known: dict[Family, float] = {
            f.WEIGHT: member.config.weight,
            f.OVERRUNS: guest.overruns if guest is not None else 0,
            f.FENCED: guest is not None and guest.fenced_until > 0,
            f.IMAGE: guest.image if guest is not None else allocated(member.config.image) or 0,
        }
        if guest is not None and guest.runs:
            known[f.UP] = guest.presence is Presence.UP
            known[f.LEFT] = guest.left
        if guest is not None and guest.lease.bound:
            known[f.GRANT] = guest.lease.granted
        report = member.client.report if member.client is not None else None
        if report is not None:
            known |= {f.AVAILABLE: report.filesystem.available_bytes, f.BALLOON: report.balloon.size_bytes}
        for family, value in known.items():
            values[family.name][name,] = value


def _size(path: str) -> int:
    """0 when the pool cannot be read. In the scraper's thread, which alone waits for a pool that hangs."""
    try:
        return capacity(path)
    except OSError:
        return 0
