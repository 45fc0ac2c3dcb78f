"""Host pressure: the table is whole, worse counts at once, better has to last, nothing swings at an edge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.core import pressure as pr
from storaged.core.model import Config, HostReport, Level, Told
from storaged.core.pressure import Pressure, Zone
from storaged.units import GIB

CONFIG = Config()
NEWS = [Told.NORMAL, Told.LOW, Told.CRITICAL]
free_bytes = st.integers(0, 8 * GIB) | st.sampled_from(
    [
        edge + by
        for edge in (CONFIG.critical_enter, CONFIG.critical_leave, CONFIG.low_enter, CONFIG.low_leave)
        for by in (-1, 0, 1)
    ]
)
levels = st.sampled_from(Level)


@st.composite
def histories(draw: st.DrawFn) -> list[HostReport]:
    """Reports that carry news, in the order of time."""
    at = 1000.0
    reports = []
    for _ in range(draw(st.integers(1, 12))):
        at += draw(st.floats(0, 30))
        reports.append(HostReport(draw(st.sampled_from(NEWS)), draw(free_bytes), at))
    return reports


def test_the_table_is_complete() -> None:
    assert set(pr.LEVEL_AFTER) == set(Level)
    for row in pr.LEVEL_AFTER.values():
        assert set(row) == set(Zone)
    assert set(pr.AT_LEAST) == set(Told) - {Told.NONE}


@pytest.mark.parametrize("level", Level)
def test_less_room_is_never_a_better_level(level: Level) -> None:
    due = [pr.LEVEL_AFTER[level][zone] for zone in Zone]
    assert due == sorted(due, reverse=True)


@pytest.mark.parametrize("zone", Zone)
def test_a_worse_level_now_is_never_a_better_one_afterwards(zone: Zone) -> None:
    due = [pr.LEVEL_AFTER[level][zone] for level in Level]
    assert due == sorted(due)


@given(level=levels, free=free_bytes)
def test_the_table_settles_after_one_look(level: Level, free: int) -> None:
    report = HostReport(Told.NORMAL, free, 0)
    once = pr.due(level, report, CONFIG)
    assert pr.due(once, report, CONFIG) is once


@pytest.mark.parametrize(
    ("free", "zone"),
    [
        (0, Zone.SCARCE),
        (GIB, Zone.SCARCE),
        (GIB + 1, Zone.SCARCE_EDGE),
        (2 * GIB - 1, Zone.SCARCE_EDGE),
        (2 * GIB, Zone.TIGHT),
        (2 * GIB + 1, Zone.TIGHT_EDGE),
        (4 * GIB - 1, Zone.TIGHT_EDGE),
        (4 * GIB, Zone.AMPLE),
        ((1 << 63) - 1, Zone.AMPLE),
    ],
)
def test_zones_at_their_borders(free: int, zone: Zone) -> None:
    assert pr.zone(free, CONFIG) is zone


@given(reports=histories())
def test_worse_counts_at_once(reports: list[HostReport]) -> None:
    pressure = Pressure()
    for report in reports:
        due = pr.due(pressure.level, report, CONFIG)
        after = pr.reported(pressure, report, CONFIG)
        if due >= pressure.level:
            assert after == Pressure(due, known=True)
        pressure = after


@given(reports=histories())
def test_better_counts_only_after_it_lasted(reports: list[HostReport]) -> None:
    pressure, better_since = Pressure(Level.CRITICAL), None
    for report in reports:
        better = pr.due(pressure.level, report, CONFIG) < pressure.level
        if better and better_since is None:
            better_since = report.at
        after = pr.reported(pressure, report, CONFIG)
        if after.level < pressure.level:
            assert better_since is not None
            assert report.at - better_since >= CONFIG.settle_s
        if not better or after.level is not pressure.level:
            better_since = None
        pressure = after


@given(reports=histories())
def test_the_level_is_never_better_than_what_the_host_names(reports: list[HostReport]) -> None:
    pressure = Pressure()
    for report in reports:
        pressure = pr.reported(pressure, report, CONFIG)
        assert pressure.level >= pr.AT_LEAST[report.told]
        later = pr.settled(pressure, report.at + 1000, CONFIG)
        assert later.level >= pr.AT_LEAST[report.told]
        assert later.pending is None


@given(
    start=levels,
    band=st.sampled_from(
        [(CONFIG.critical_enter + 1, CONFIG.critical_leave - 1), (CONFIG.low_enter + 1, CONFIG.low_leave - 1)]
    ),
    data=st.data(),
)
def test_nothing_swings_inside_a_hysteresis_band(start: Level, band: tuple[int, int], data: st.DataObject) -> None:
    pressure, at, seen = Pressure(start), 0.0, [start]
    for _ in range(data.draw(st.integers(1, 20))):
        at += data.draw(st.floats(0, 60))
        report = HostReport(Told.NORMAL, data.draw(st.integers(*band)), at)
        pressure = pr.settled(pr.reported(pressure, report, CONFIG), at, CONFIG)
        if pressure.level is not seen[-1]:
            seen.append(pressure.level)
    assert len(seen) <= 2, "one change into the band's level at most"


@given(told=st.sampled_from(Told), free=st.integers(-(1 << 63), (1 << 63) - 1))
def test_news_is_a_named_state_and_a_number(told: Told, free: int) -> None:
    assert pr.carries_no_news(HostReport(told, free, 0)) == (told is Told.NONE or free < 0)


def test_a_better_report_does_not_start_the_wait_anew() -> None:
    pressure = pr.reported(Pressure(Level.CRITICAL), HostReport(Told.NORMAL, 8 * GIB, 0), CONFIG)
    assert (pressure.level, pressure.pending) == (Level.CRITICAL, Level.NORMAL)
    pressure = pr.reported(pressure, HostReport(Told.NORMAL, 3 * GIB, 5), CONFIG)
    assert (pressure.level, pressure.pending, pressure.pending_since) == (Level.CRITICAL, Level.LOW, 0)
    assert pr.settles_at(pressure, CONFIG) == CONFIG.settle_s
    assert pr.settled(pressure, CONFIG.settle_s - 0.1, CONFIG) == pressure
    assert pr.settled(pressure, CONFIG.settle_s, CONFIG) == Pressure(Level.LOW, known=True)


def test_a_relapse_ends_the_wait() -> None:
    pressure = pr.reported(Pressure(Level.CRITICAL), HostReport(Told.NORMAL, 8 * GIB, 0), CONFIG)
    pressure = pr.reported(pressure, HostReport(Told.NORMAL, 0, 5), CONFIG)
    assert pressure == Pressure(Level.CRITICAL, known=True)
    assert pr.settles_at(pressure, CONFIG) is None


@given(since=st.floats(0, 1e7, allow_nan=False), settle_s=st.floats(0, 1e4, allow_nan=False))
def test_time_is_up_exactly_when_it_was_said_to_be(since: float, settle_s: float) -> None:
    config = Config(settle_s=settle_s)
    pressure = Pressure(Level.LOW, pending=Level.NORMAL, pending_since=since)
    at = pr.settles_at(pressure, config)
    assert at is not None
    assert pr.settled(pressure, at, config).level is Level.NORMAL
