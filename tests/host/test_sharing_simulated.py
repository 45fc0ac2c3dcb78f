"""The simulation that sharers are compared in: its own arithmetic, and what the core makes of a few seeds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.sharing import clairvoyant
from lab.sharing.disk import Disk
from lab.sharing.sharers import Broadcast, Ours
from lab.sharing.workload import NEVER, Plan, Want, Workload, draw
from storaged.units import GIB

PLAN = Plan("a", 1.0, 100, 0, ((0, 8),), (), ())
wants = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 3), st.integers(1, 8) | st.just(NEVER)), min_size=1, max_size=7
)


def _workload(items: list[tuple[int, int, int]], room: int) -> Workload:
    steps: list[list[Want]] = [[] for _ in range(8)]
    for at, size, lasts in items:
        until = at + lasts
        steps[at].append((0, size, until if until < 8 else NEVER))
    return Workload(0, 8, room, [PLAN], steps, [0] * 8)


def _best(workload: Workload) -> int:
    """By trying everything: the least that must be denied."""
    items = [(at, *want) for at, here in enumerate(workload.wants) for want in here]
    total = sum(size for _, _, size, _ in items)
    best = total
    for given_ in itertools.product(*(range(size + 1) for _, _, size, _ in items)):
        fits = all(
            sum(gets for gets, (at, _, _, until) in zip(given_, items, strict=True) if at <= step < until)
            <= workload.room
            for step in range(workload.steps)
        )
        if fits:
            best = min(best, total - sum(given_))
    return best


@given(wants, st.integers(1, 5))
@settings(max_examples=60)
def test_nobody_denies_less_than_in_hindsight(items: list[tuple[int, int, int]], room: int) -> None:
    workload = _workload(items, room)
    assert clairvoyant.in_hindsight(workload) == _best(workload)
    assert clairvoyant.denied(workload) >= clairvoyant.in_hindsight(workload)


def test_a_workload_is_the_same_every_time() -> None:
    assert draw(3, 600.0) == draw(3, 600.0)
    assert draw(3, 600.0) != draw(4, 600.0)


@pytest.mark.parametrize("seed", [3, 9, 28])
def test_the_core_never_fills_the_disk_and_denies_little(seed: int) -> None:
    workload = draw(seed, 3600.0)
    outcome = Disk(workload, Ours).run()
    assert outcome.full_s == 0
    assert outcome.broken == 0
    assert outcome.denied <= 1.3 * clairvoyant.denied(workload) + GIB


def test_telling_everybody_the_same_fills_the_disk() -> None:
    outcome = Disk(draw(9), Broadcast).run()
    assert outcome.full_s > 0
    assert outcome.broken > 0
