"""Samples of us and of a peer, taken in turns, and what they come to."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

NOISY = 0.25
"""A row is marked when half of its samples lie further apart than this share of the median."""


@dataclass(frozen=True, slots=True)
class Goal:
    """At most `limit`, of the value itself or of its ratio to the peer."""

    limit: float
    of_ratio: bool = False


@dataclass(slots=True)
class Row:
    """One line of the table: the medians of `ours` and `peer` count."""

    section: str
    name: str
    unit: str
    peer_name: str = ""
    goal: Goal | None = None
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median of ours."""
        return statistics.median(self.ours) if self.ours else math.nan

    @property
    def peer_value(self) -> float | None:
        """The median of the peer; None when it has none."""
        return statistics.median(self.peer) if self.peer else None

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        peer = self.peer_value
        return self.value / peer if peer else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or without what it is measured against."""
        if self.goal is None:
            return None
        value = self.ratio if self.goal.of_ratio else self.value
        return None if value is None or math.isnan(value) else value <= self.goal.limit

    @property
    def noisy(self) -> bool:
        """True when the samples lie too far apart to believe small differences."""
        return max(spread(self.ours), spread(self.peer)) > NOISY


def spread(samples: Sequence[float]) -> float:
    """The range of the middle half of `samples`, as a share of the median."""
    if len(samples) < 4 or not (middle := statistics.median(samples)):
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def milliseconds(call: Callable[[], object]) -> float:
    """How long `call` takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def in_turns(index: int, *sides: Callable[[], None]) -> None:
    """Call every side once; who begins changes with `index`."""
    for side in sides if index % 2 == 0 else reversed(sides):
        side()


def say(text: str) -> None:
    """What is being done, on standard error."""
    print(f"  {text}", file=sys.stderr, flush=True)


def rows_of(table: Iterable[Row]) -> list[Row]:
    """Those rows for which anything was measured."""
    return [row for row in table if row.ours]
