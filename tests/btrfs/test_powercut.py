"""The power goes at any flush: nothing that was certain is lost, and the daemon converges on what is left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import loop, powercut, writelog
from lab.story import Plan, Recording, plan, record
from lab.writelog import Replay
from storaged.units import MIB
from tests.btrfs.support import Figures

pytestmark = [
    pytest.mark.btrfs,
    pytest.mark.once,
    pytest.mark.skipif(bool(writelog.why_not()), reason=f"write log: {writelog.why_not()}"),
]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    loop.sweep(loop.memory())
    with loop.workspace(loop.memory()) as path:
        yield path


@pytest.fixture(scope="module")
def life() -> Plan:
    return plan(seed=3, rounds=1)


@pytest.fixture(scope="module")
def recording(life: Plan, place: Path) -> Recording:
    return record(life, place)


def _cut(tallies: Iterator[powercut.Tally], figures: Figures) -> powercut.Tally:
    last = powercut.Tally()
    for tally in tallies:
        last = tally
    figures.show("power cuts", last)
    return last


def test_the_recording_is_worth_cutting(life: Plan, recording: Recording) -> None:
    sizes = [size for _, size in recording.sizes]
    assert recording.moved > 4 * MIB  # the shrink had to move data
    assert min(sizes) < life.size * 3 // 4
    assert sum(entry.flushes for entry in recording.entries) > 50
    assert len(recording.ledger.records) >= 2
    assert powercut.told_too_early(recording) == []


def test_nothing_is_lost_at_some_flushes(life: Plan, recording: Recording, place: Path, figures: Figures) -> None:
    tally = _cut(powercut.cut(life, recording, place, points=len(powercut.WORK)), figures)
    assert tally.faults == []
    assert tally.flushes == len(powercut.WORK)
    assert set(tally.cuts) == set(powercut.WORK), tally


def test_a_disk_that_forgets_what_was_flushed_is_found_out(life: Plan, recording: Recording, place: Path) -> None:
    # Else the other tests would pass on anything.
    dice = random.Random(1)
    image = place / "forgetful.img"
    with Replay(recording.log, recording.base) as replay, replay.copy_to(image) as copy:
        for entry in recording.entries:
            if dice.random() > 0.1:
                copy.apply(entry)
    end = recording.entries[-1].end
    assert powercut.Look(recording, life.mount, place, end, end).all(image)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_lost_at_any_flush(seed: int, figures: Figures) -> None:
    every = plan(seed)
    with loop.workspace(loop.memory()) as directory:
        tally = _cut(powercut.cut(every, record(every, directory), directory), figures)
    assert tally.faults == []
    assert set(tally.cuts) >= set(powercut.WORK), tally
    assert tally.torn, tally
    assert tally.mid_journal, tally
    assert tally.mid_resize, tally
