"""The gate: random filesystems, each shrunk once to the size that is promised. By hand: `python -m lab.gate`."""

from __future__ import annotations

import os
import statistics

import pytest

from lab.gate import Verdict, judge, summary
from lab.layouts import recipe
from lab.loop import memory, workspace
from storaged.resize.layout import KERNEL_MINIMUM
from storaged.units import GIB
from tests.btrfs.support import Figures

pytestmark = [pytest.mark.btrfs, pytest.mark.once]

FIRST = 1000
FEW, MANY = 3, 300
GOAL = 0.75
"""What is reached against `btrfs inspect-internal min-dev-size`, at the median of many layouts."""


def _judged(first: int, count: int, most: int, *, brute_force: bool) -> list[Verdict]:
    verdicts = []
    for seed in range(first, first + count):
        with workspace(memory()) as directory:
            verdicts.append(judge(recipe(seed, most), directory, brute_force=brute_force))
    return verdicts


def test_a_few_layouts(figures: Figures) -> None:
    verdicts = _judged(FIRST, FEW, GIB, brute_force=False)
    figures.say(f"the gate: {summary(verdicts)}")
    assert not [fault for verdict in verdicts for fault in verdict.faults], summary(verdicts)


@pytest.mark.slow
def test_many_layouts(figures: Figures) -> None:
    verdicts = _judged(FIRST, int(os.environ.get("STORAGED_LAYOUTS", MANY)), 8 * GIB, brute_force=True)
    figures.say(f"the gate: {summary(verdicts)}")
    assert not [fault for verdict in verdicts for fault in verdict.faults], summary(verdicts)
    assert statistics.median(v.reached / v.min_dev_size for v in verdicts) <= GOAL, summary(verdicts)
    above = [v for v in verdicts if v.reached > max(v.min_dev_size, KERNEL_MINIMUM)]
    figures.say(f"above min-dev-size though 256 MiB is less: {[str(v) for v in above]}")
    assert len(above) <= len(verdicts) // 50, "only where metadata would have no room to live"
