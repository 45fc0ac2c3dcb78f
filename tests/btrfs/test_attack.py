"""The attack suite: every answer SUCCESS must be true on real filesystems, in memory and on the disk.

The quick scenarios take about a minute and a half; all of them and the storms, half an hour.
"""

from __future__ import annotations

import pytest

from lab.attack import scenarios
from lab.attack.__main__ import attack
from lab.attack.registry import Scenario
from lab.attack.storm.run import storm
from lab.attack.testbed import opened_testbed
from tests.btrfs.support import Figures

pytestmark = pytest.mark.btrfs

SEED = 1
QUICK_STORM_S = 12.0
STORM_S = 240.0
ON_DISK = ("idle-first-report", "data-dup")
"""Quick scenarios that run on the disk too."""
THOROUGH_ON_DISK = (
    "idle-first-report",
    "idle-many-reports",
    "preallocated-one-file",
    "preallocated-small-files",
    "preallocated-snapshots-allowed",
    "preallocated-swap-file",
    "strict-at-last-dup",
    "racing-dup",
    "data-dup",
    "small-files-beside-data-333",
    "during-full-balance",
    "rollback",
)
"""The disk takes longer; `make attack` runs every scenario there too."""


def _cases() -> list[object]:
    cases: list[object] = []
    for one in scenarios().values():
        if one.name == "storm":
            continue
        for place in one.places:
            quick = one.quick and (place == "shm" or one.name in ON_DISK)
            if quick:
                cases.append(pytest.param(one, place, True, id=f"{one.name}-{place}"))
            if place == "disk" and one.name not in THOROUGH_ON_DISK:
                continue
            marks = [pytest.mark.slow, pytest.mark.timeout(600)]
            cases.append(pytest.param(one, place, False, id=f"{one.name}-{place}-thorough", marks=marks))
    return cases


@pytest.mark.parametrize(("one", "place", "quick"), _cases())
def test_every_success_is_true(one: Scenario, place: str, quick: bool) -> None:
    assert attack(one, place, SEED, quick=quick) == []


LONG = (pytest.mark.slow, pytest.mark.timeout(900))


@pytest.mark.parametrize(
    ("place", "seconds", "seed"),
    [
        pytest.param("shm", QUICK_STORM_S, 1, id="short"),
        pytest.param("shm", STORM_S, 2, id="long-shm", marks=LONG),
        pytest.param("disk", STORM_S, 3, id="long-disk", marks=LONG),
    ],
)
def test_answers_stay_true_in_a_storm(place: str, seconds: float, seed: int, figures: Figures) -> None:
    with opened_testbed("storm", place, seed, quick=seconds == QUICK_STORM_S) as bed:
        faults = storm(bed, seconds)
    figures.show("storm", f"{place}, {seconds:g} s, {len(faults)} faults")
    assert faults == []
