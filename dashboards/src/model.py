"""A dashboard as plain values: what its panels ask, how the answers are shown, what to do about them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

BYTES, RATE, SECONDS, SHARE, COUNT, CALLS = "bytes", "binBps", "s", "percentunit", "none", "reqps"
"""Units by Grafana's names: IEC bytes, bytes a second, seconds, 0 to 1, plain, calls a second."""
GREEN, AMBER, RED, BLUE, GREY = "green", "orange", "red", "blue", "text"
MIB = 1 << 20
Steps = tuple[tuple[float | None, str], ...]
PLAIN: Steps = ((None, BLUE),)
"""No judgement. Set everywhere: Grafana's own default paints all above 80 red."""
ANY_IS_BAD: Steps = ((None, GREEN), (1, RED))
LITTLE_IS_BAD: Steps = ((None, RED), (256 * MIB, AMBER), (1024 * MIB, GREEN))
NEGATIVE_IS_BAD: Steps = ((None, RED), (0, GREEN))


class Kind(enum.Enum):
    """What shows the answers."""

    STAT = "stat"
    LINES = "timeseries"
    STACK = "stacked timeseries"
    STATES = "state-timeline"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Query:
    """One query. In a table, `legend` is the heading of its column."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `runbook` names the alert that watches the same thing."""

    title: str
    text: str
    kind: Kind
    unit: str
    queries: tuple[Query, ...]
    width: int = 12
    height: int = 8
    steps: Steps = PLAIN
    names: tuple[tuple[int, str, str], ...] = ()  # value, text, colour
    runbook: str = ""
    quiet: str = ""  # shown when nothing happened that could be measured
    units: tuple[tuple[str, str], ...] = ()  # by column, in a table


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and its panels; their widths fill lines of 24."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of the page. Single ones feed links by name."""

    name: str
    label: str
    query: str
    many: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """A whole dashboard."""

    uid: str
    title: str
    text: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


def stat(title: str, text: str, expr: str, unit: str, *, steps: Steps = PLAIN, **more: object) -> Panel:
    """One number."""
    query = Query(expr, str(more.pop("legend", title)))
    return Panel(title, text, Kind.STAT, unit, (query,), 4, 4, steps, **more)  # type: ignore[arg-type]


def lines(title: str, text: str, unit: str, *queries: tuple[str, str], **more: object) -> Panel:
    """Lines over time."""
    return Panel(title, text, Kind.LINES, unit, tuple(Query(*query) for query in queries), **more)  # type: ignore[arg-type]
