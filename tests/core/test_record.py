"""What survives a crash comes back as it was; what we did not write is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.core.model import DirtyLimits, HostReport, KernelReclaim, Level, Told
from storaged.core.pressure import Pressure
from storaged.core.record import Remembered, from_record, to_record
from storaged.core.state import Balloon, State
from storaged.resize.job import Job, JobState
from tests.core.events import FOUND, dirty, jobs, limits, reports

states = st.builds(
    State,
    pressure=st.builds(Pressure, level=st.sampled_from(Level)),
    report=st.none() | reports.filter(lambda report: report.free >= 0),
    balloon=st.builds(Balloon, limit=limits),
    dirty_found=st.none() | dirty,
    reclaim_found=st.none() | st.builds(KernelReclaim, st.integers(0, 100), st.integers(0, 1), st.integers(0, 1)),
    job=st.none() | jobs,
)
FULL = to_record(
    State(
        pressure=Pressure(Level.LOW),
        report=HostReport(Told.LOW, 5, 0.0, 9.0),
        balloon=Balloon(limit=7),
        dirty_found=FOUND,
        job=Job("a", 1, 2, 3, JobState.DONE, started=4.0, ended=5.0),
    )
)


@given(state=states)
def test_what_was_written_is_what_is_read(state: State) -> None:
    record: dict[str, Any] = json.loads(json.dumps(to_record(state)))
    found = from_record(record, now=77.0)
    assert (found.limit, found.level, found.dirty_found) == (
        state.balloon.limit,
        state.pressure.level,
        state.dirty_found,
    )
    assert found.reclaim_found == state.reclaim_found
    if state.report is None:
        assert found.report is None
    else:
        assert found.report == HostReport(state.report.told, state.report.free, 77.0, state.report.wall)
    if state.job is None:
        assert found.job is None
    else:
        assert found.job is not None
        kept = ("id", "requested", "start_size", "current_size", "state", "started", "ended", "reason")
        assert [getattr(found.job, name) for name in kept] == [getattr(state.job, name) for name in kept]
        assert found.job.progress == (1.0 if state.job.state is JobState.DONE else 0.0)


def test_an_empty_state() -> None:
    assert from_record(to_record(State()), 0.0) == Remembered(level=Level.NORMAL)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5, [1]])
def test_another_version_is_refused(version: object) -> None:
    with pytest.raises(ValueError, match="version"):
        from_record({**FULL, "version": version}, 0.0)


@pytest.mark.parametrize("key", ["limit", "level", "report", "dirty_found", "job"])
def test_a_missing_part_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="journal"):
        from_record({name: value for name, value in FULL.items() if name != key}, 0.0)


foreign = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["NORMAL", "DONE"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def damage(data: st.DataObject) -> dict[str, Any]:
    """A record in which one value, at any depth, is another one."""
    record: dict[str, Any] = json.loads(json.dumps(FULL))
    place = record
    key = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict) and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(foreign)
    return record


@given(data=st.data())
def test_a_damaged_document_is_refused_or_makes_sense(data: st.DataObject) -> None:
    try:
        found = from_record(damage(data), 0.0)
    except ValueError:
        return
    assert found.limit is None or found.limit >= 0
    assert isinstance(found.level, Level)
    assert found.report is None or found.report.free >= 0
    assert found.job is None or found.job.requested >= 0
    if found.dirty_found is not None:
        assert isinstance(found.dirty_found, DirtyLimits)
        assert min(found.dirty_found.dirty_bytes, found.dirty_found.dirty_ratio) >= 0


@given(document=st.dictionaries(st.text(max_size=12), foreign, max_size=6))
def test_a_foreign_document_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"version|journal"):
        from_record({**document, "version": document.get("version", 1)}, 0.0)


def test_a_time_beyond_all_floats_is_refused() -> None:
    record: dict[str, Any] = json.loads(json.dumps(FULL))
    record["job"]["started"] = 10**400
    with pytest.raises(ValueError, match="journal"):
        from_record(record, 0.0)
