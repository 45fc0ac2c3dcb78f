"""Two guests at full speed on one disk, bursts, kills: with the controller nobody is harmed, without it somebody is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lab.adversary.figures import Figures
from lab.adversary.run import attack
from lab.loop import workspace

pytestmark = [pytest.mark.btrfs, pytest.mark.timeout(600)]


def _attacked(seconds: float, *, controlled: bool, enough: Callable[[Figures], bool]) -> Figures:
    with workspace() as directory:
        figures = attack(directory, seconds, 1, controlled=controlled, enough=enough)
    print(figures)  # noqa: T201  # the figures are what one runs it for
    return figures


@pytest.mark.parametrize(("seconds", "kills"), [(90, 3), pytest.param(240, 1000, marks=pytest.mark.slow)])
def test_with_the_controller_nobody_is_harmed(seconds: float, kills: int) -> None:
    figures = _attacked(
        seconds, controlled=True, enough=lambda seen: sum(seen.kills.values()) >= kills and seen.enospc >= 3
    )
    assert figures.unharmed, figures
    assert figures.enospc, "the guests wanted more than there was"
    assert figures.whole
    assert sum(figures.kills.values()) >= 2


def test_without_it_writes_that_were_accepted_are_lost() -> None:
    figures = _attacked(90, controlled=False, enough=lambda seen: seen.io_errors >= 3)
    assert figures.io_errors
    assert figures.host_full
