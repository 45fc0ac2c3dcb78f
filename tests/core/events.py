"""Short ways to write events, and a strategy for any event at any time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import strategies as st

from storaged.core import events as ev
from storaged.core.machine import next_wakeup, step
from storaged.core.model import DirtyLimits, HostReport, Told
from storaged.core.state import Result, State
from storaged.resize.job import Job, JobState
from storaged.units import GIB, MIB

FOUND = DirtyLimits(0, 0, 20, 10)
E = TypeVar("E", bound=ev.Effect)
FACTS = ev.Facts(size=8 * GIB, device=16 * GIB, minimum=GIB, why="data ends there")


def kinds(effects: tuple[ev.Effect, ...]) -> list[type[ev.Effect]]:
    """The effects' types, notes left out."""
    return [type(effect) for effect in effects if not isinstance(effect, ev.Note)]


def of(effects: tuple[ev.Effect, ...], kind: type[E]) -> list[E]:
    """The effects of one type."""
    return [effect for effect in effects if isinstance(effect, kind)]


def reported(free: int, told: Told = Told.NORMAL, at: float = 0.0) -> ev.HostReported:
    """UpdateStorageBalloon."""
    return ev.HostReported(HostReport(told, free, at, at))


def requested(size: int, id: str = "a", facts: ev.Facts = FACTS, at: float = 0.0) -> ev.ResizeRequested:  # noqa: A002
    """ResizeFilesystem."""
    return ev.ResizeRequested(size, id, facts, at, at)


def ended(
    id: str = "a",  # noqa: A002
    outcome: ev.Outcome = ev.Outcome.SUCCEEDED,
    size: int = 4 * GIB,
    reason: str = "",
    at: float = 0.0,
) -> ev.JobEnded:
    """The runner's last word."""
    return ev.JobEnded(id, outcome, size, reason, at, at)


def play(state: State, *events: ev.Event) -> Result:
    """The state after all of `events`, and all effects in order."""
    effects: list[ev.Effect] = []
    for event in events:
        state, asked = step(state, event)
        effects.extend(asked)
    return state, tuple(effects)


def wake(state: State, wall: float = 0.0) -> ev.Event | None:
    """What the daemon sends when the time of `next_wakeup` has come; None while nothing waits."""
    at = next_wakeup(state)
    if at is None:
        return None
    if state.poll_at is not None and at >= state.poll_at:
        return ev.CapacityChanged(0, at, wall)
    return ev.Tick(at, wall)


IDS = st.sampled_from("abc")
sizes = st.integers(0, 20 * GIB) | st.sampled_from([0, 256 * MIB, 4 * GIB, 8 * GIB, 16 * GIB, 1 << 63, (1 << 64) - 1])
limits = st.none() | st.integers(0, 8 * GIB)
facts = st.builds(
    ev.Facts,
    size=st.integers(256 * MIB, 16 * GIB).map(lambda size: size // 4096 * 4096),
    device=st.integers(256 * MIB, 32 * GIB),
    minimum=st.sampled_from([0, 256 * MIB, GIB, 4 * GIB]),
    why=st.just("because"),
    read_only=st.booleans(),
)
dirty = st.builds(
    DirtyLimits,
    dirty_bytes=st.integers(0, GIB),
    dirty_background_bytes=st.integers(0, GIB),
    dirty_ratio=st.integers(0, 100),
    dirty_background_ratio=st.integers(0, 100),
)
reports = st.builds(
    HostReport,
    told=st.sampled_from(Told),
    free=st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 8 * GIB),
    at=st.just(0.0),
    wall=st.floats(0, 2e9),
)
jobs = st.builds(
    Job,
    id=IDS,
    requested=st.integers(256 * MIB, 16 * GIB),
    start_size=st.integers(256 * MIB, 16 * GIB),
    current_size=st.integers(256 * MIB, 16 * GIB),
    state=st.sampled_from([state for state in JobState if state is not JobState.REQUESTED]),
    started=st.floats(0, 2e9),
    ended=st.floats(0, 2e9),
    reason=st.text(max_size=20),
)


_now = st.just(0.0)
events: st.SearchStrategy[ev.Event] = st.one_of(
    st.builds(ev.HostReported, report=reports),
    st.builds(ev.BalloonSettled, limit=limits, size=st.integers(0, 8 * GIB), at=_now, again=st.booleans()),
    st.builds(ev.BalloonSampled, size=st.integers(0, 8 * GIB), relief=st.integers(0, GIB), at=_now),
    st.builds(
        ev.BalloonFailed,
        limit=limits,
        size=st.integers(0, 8 * GIB),
        reason=st.sampled_from(["no room", "busy"]),
        at=_now,
    ),
    st.builds(ev.ResizeRequested, size=sizes, id=IDS, facts=facts, at=_now, wall=_now),
    st.builds(ev.CancelRequested, at=_now, wall=_now),
    st.builds(ev.JobPrepared, id=IDS),
    st.builds(
        ev.JobProgressed, id=IDS, current_size=sizes, moved=st.integers(0, GIB), to_move=st.integers(0, GIB), at=_now
    ),
    st.builds(ev.CapacityChanged, device=st.integers(0, 32 * GIB), at=_now, wall=_now),
    st.builds(ev.SuspendRequested, at=_now),
    st.builds(ev.Tick, at=_now, wall=_now),
    st.builds(ev.Trimmed, size=st.integers(0, GIB), error=st.sampled_from(["", "no"])),
    st.builds(ev.ReleaseRequested, at=_now),
)
"""Any event that comes by itself, at time 0, also ones that make no sense just then."""


def moved(event: ev.Event, at: float) -> ev.Event:
    """`event` at the time `at`."""
    if isinstance(event, ev.HostReported):
        return ev.HostReported(replace(event.report, at=at))
    times: dict[str, Any] = {name: at for name in ("at", "wall") if hasattr(event, name)}
    return replace(event, **times) if times else event
