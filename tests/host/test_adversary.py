"""Two guests at full speed on one disk, bursts, kills: with the controller nobody is harmed, without it somebody is."""

from __future__ import annotations

import pytest

from lab.adversary import Figures, attack
from lab.loop import workspace

pytestmark = [pytest.mark.btrfs, pytest.mark.timeout(600)]


def _attacked(seconds: float, seed: int, *, controlled: bool) -> Figures:
    with workspace() as directory:
        figures = attack(directory, seconds, seed, controlled=controlled)
    print(figures)  # noqa: T201  # the figures are what one runs it for
    return figures


@pytest.mark.parametrize("seconds", [20, pytest.param(180, marks=pytest.mark.slow)])
def test_with_the_controller_nobody_is_harmed(seconds: float) -> None:
    figures = _attacked(seconds, 1, controlled=True)
    assert figures.unharmed, figures
    assert figures.enospc, "the guests wanted more than there was"
    assert figures.whole
    assert sum(figures.kills.values()) >= 2


def test_without_it_writes_that_were_accepted_are_lost() -> None:
    figures = _attacked(15, 1, controlled=False)
    assert figures.io_errors
    assert figures.host_full
