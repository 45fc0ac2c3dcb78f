"""The host's metrics: every pool, every guest, as the controllers believe them to be. Names are a contract."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from storaged.host.controller import Controller
from storaged.host.levels import Level
from storaged.host.model import Presence, State, books
from storaged.host.watch import capacity

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds from a crossing to the last guest's answer; the goal for a thousand guests is 0.25."""
REASONS = ("pool fell", "pool rose", "guests")


@dataclass(slots=True)
class _Watched:
    """One pool, and what was counted on the way."""

    controller: Controller
    level: Level = Level.NORMAL
    crossed_at: float | None = None
    free: int = 0
    granted: dict[str, int] = field(default_factory=dict)


class HostCollector(Collector):
    """Made on the event loop; collected from any thread: what it reads is frozen."""

    def __init__(self, controllers: Sequence[Controller]) -> None:
        self._pools = [_Watched(controller) for controller in controllers]
        self._rebalances: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._reactions = [0] * (len(BUCKETS) + 1)
        self._reacted_s = 0.0
        for pool in self._pools:
            pool.controller.observe(lambda state, pool=pool: self._observe(pool, state))  # type: ignore[misc]

    def _observe(self, pool: _Watched, state: State) -> None:
        granted = {name: guest.lease.granted for name, guest in state.guests.items() if guest.lease.bound}
        if granted != pool.granted:
            moved = state.pool.free - pool.free
            reason = "guests" if not pool.granted or not moved else "pool fell" if moved < 0 else "pool rose"
            self._rebalances[reason] += 1
            pool.granted, pool.free = granted, state.pool.free
        level = state.pool.pressure.level
        if level > pool.level:
            pool.crossed_at = time.monotonic()
        pool.level = level
        waiting = any(guest.lease.flight and guest.presence is Presence.UP for guest in state.guests.values())
        if pool.crossed_at is not None and not waiting:
            took = time.monotonic() - pool.crossed_at
            self._reactions[bisect_left(BUCKETS, took)] += 1
            self._reacted_s += took
            pool.crossed_at = None

    def describe(self) -> Iterator[Metric]:
        """Registering reads nothing."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        yield from self._of_pools()
        yield from self._of_guests()
        rebalances = CounterMetricFamily(
            "storaged_host_rebalances", "Times that grants were changed", labels=["reason"]
        )
        for reason, count in self._rebalances.items():
            rebalances.add_metric([reason], count)
        yield rebalances
        reaction = HistogramMetricFamily(
            "storaged_host_reaction_seconds", "From a worse level to the last guest's answer", labels=[]
        )
        bounds = [*map(floatToGoString, BUCKETS), "+Inf"]
        reaction.add_metric([], list(zip(bounds, accumulate(self._reactions), strict=True)), self._reacted_s)
        yield reaction

    def _of_pools(self) -> Iterator[Metric]:
        parts = {
            "size": "Bytes of the pool",
            "free": "Bytes free in the pool",
            "reserve": "Bytes kept from every guest",
            "promised": "Bytes that guests may still write; never more than free less reserve",
        }
        families = {
            part: GaugeMetricFamily(f"storaged_host_pool_{part}_bytes", text, labels=["pool"])
            for part, text in parts.items()
        }
        pressure = GaugeMetricFamily("storaged_host_pressure", "Level of the pool, one-hot", labels=["pool", "state"])
        for watched in self._pools:
            name, state = watched.controller.pool.name, watched.controller.state
            if state.pool.at is None:
                continue  # not read yet
            account = books(state)
            values = (
                _size(watched.controller.pool.path),
                account.free,
                account.reserve,
                account.set_aside,
            )
            for family, value in zip(families.values(), values, strict=True):
                family.add_metric([name], value)
            for level in Level:
                pressure.add_metric([name, level.name.lower()], state.pool.pressure.level is level)
        yield from families.values()
        yield pressure

    def _of_guests(self) -> Iterator[Metric]:
        grant, available, balloon, weight, up = (
            GaugeMetricFamily(f"storaged_host_guest_{name}", text, labels=["vm"])
            for name, text in (
                ("grant_bytes", "Bytes the guest may write, as it was last told"),
                ("available_bytes", "Bytes the guest says that its applications can write"),
                ("balloon_bytes", "Bytes its balloon holds"),
                ("weight", "Its share against others"),
                ("up", "1 while it runs and answers"),
            )
        )
        image = GaugeMetricFamily("storaged_host_image_allocated_bytes", "What its image costs the host", labels=["vm"])
        for watched in self._pools:
            for name, guest in watched.controller.state.guests.items():
                weight.add_metric([name], guest.weight)
                up.add_metric([name], guest.presence is Presence.UP)
                image.add_metric([name], guest.image)
                if guest.lease.bound:
                    grant.add_metric([name], guest.lease.granted)
                member = watched.controller.members.get(name)
                report = member.client.report if member is not None and member.client is not None else None
                if report is not None:
                    available.add_metric([name], report.filesystem.available_bytes)
                    balloon.add_metric([name], report.balloon.size_bytes)
        yield from (grant, available, balloon, weight, up, image)


def _size(path: str) -> int:
    """0 when the pool cannot be read. In the scraper's thread, which alone waits for a pool that hangs."""
    try:
        return capacity(path)
    except OSError:
        return 0
