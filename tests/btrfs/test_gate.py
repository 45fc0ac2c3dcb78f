"""The gate: random filesystems, each shrunk once to the size that is promised. By hand: `python -m lab.gate`."""

from __future__ import annotations

import mmap
import os
import statistics

import pytest

from lab.gate import Verdict, damage, judge, summary
from lab.layouts import fingerprints, recipe
from lab.loop import Guest, memory, workspace
from lab.recovery import write_durably
from storaged.resize.layout import KERNEL_MINIMUM
from storaged.units import GIB, MIB, SECTOR
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


@pytest.mark.parametrize("mount", ["", "nodatacow"])
def test_a_damaged_sector_is_found_out(mount: str) -> None:
    # Else the layouts would pass whatever became of their files: the kernel still has them in memory.
    content = os.urandom(MIB)
    with workspace(memory()) as directory:
        guest = Guest(directory, 256 * MIB, mount=mount)
        write_durably(guest.mountpoint / "file", content)
        before = fingerprints(guest.mountpoint)
        with guest.image.open("r+b") as image, mmap.mmap(image.fileno(), 0) as disk:
            at = disk.find(content[:SECTOR])
            disk[at : at + SECTOR] = os.urandom(SECTOR)
        found = damage(guest, before)
    assert found[0] == "damaged: file"
    # Without checksums the file's own hash is all there is.
    assert [fault.split(":")[0] for fault in found[1:]] == ([] if mount else ["btrfs check"])


def test_a_few_layouts(figures: Figures) -> None:
    verdicts = _judged(FIRST, FEW, GIB, brute_force=False)
    figures.show("gate", summary(verdicts))
    assert any(verdict.room and verdict.room.tested for verdict in verdicts), summary(verdicts)
    assert not [fault for verdict in verdicts for fault in verdict.faults], summary(verdicts)


@pytest.mark.slow
def test_many_layouts(figures: Figures) -> None:
    verdicts = _judged(FIRST, int(os.environ.get("STORAGED_LAYOUTS", MANY)), 8 * GIB, brute_force=True)
    figures.show("gate", summary(verdicts))
    assert not [fault for verdict in verdicts for fault in verdict.faults], summary(verdicts)
    assert statistics.median(v.reached / v.min_dev_size for v in verdicts) <= GOAL, summary(verdicts)
    above = [v for v in verdicts if v.reached > max(v.min_dev_size, KERNEL_MINIMUM)]
    assert len(above) <= len(verdicts) // 50, f"only where metadata would have no room to live: {above}"
