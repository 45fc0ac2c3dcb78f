"""What a metric is: its name, type, labels, and when it is there. Guest and host describe theirs with it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


class Type(enum.Enum):
    """Types of the exposition format."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `labels` are names and all their values, from the start; no values: made known at run time."""

    name: str
    type: Type
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    present: str = ALWAYS

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names alone."""
        return tuple(name for name, _ in self.labels)

    @property
    def samples(self) -> tuple[str, ...]:
        """The names that a query can use."""
        if self.type is Type.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram's value: how many were at most each bound and above the one before, the last above all; their sum."""

    bounds: tuple[float, ...]
    counts: Sequence[int]
    total: float


Values = Mapping[tuple[str, ...], float | Distribution]
"""By the labels' values, in the family's order."""
PLAIN: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """A family and what it is now; empty: it is not there."""

    family: Family
    values: Values = field(default_factory=dict)


def one_hot(states: tuple[str, ...], now: str, *before: str) -> dict[tuple[str, ...], float]:
    """1 at the present state; `before` are the labels that come first."""
    return {(*before, state): float(state == now) for state in states}
