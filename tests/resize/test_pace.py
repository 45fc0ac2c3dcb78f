"""A shrink rests while others write, and only then."""

from __future__ import annotations

import threading
import time
from dataclasses import fields

import pytest

from storaged.core.model import Config
from storaged.resize import pace
from storaged.resize.calls import KernelCalls
from storaged.resize.job import Job
from storaged.resize.work import Work
from storaged.units import GIB, MIB
from tests.resize.guest import Guest


def test_every_setting_has_a_rest() -> None:
    choices = next(item.metadata["choices"] for item in fields(Config) if item.name == "resize_impact")
    assert set(choices) == set(pace.RESTS)
    low, normal, high = (pace.rest_s(impact, 2.0) for impact in choices)
    assert (low, normal, high) == (16.0, 2.0, 0.0)
    assert pace.rest_s("low", 1e6) == pace.MOST_S


class Bench:
    """Calls that have worked for so long, on a disk that others write to, or not."""

    def __init__(self, impact: str, *, writes: bool) -> None:
        self.guest = Guest()
        world = self.guest.world
        self.calls = KernelCalls(world.filesystem, world.resizer, world.clock, 0.005, lambda: impact)
        self.calls._worked_s = 0.2
        self.work = Work(Job("a", GIB, 2 * GIB, 2 * GIB), lambda _: None, lambda: None, threading.Event())
        self._done = threading.Event()
        self._writes = writes

    def rests(self) -> float:
        """Seconds of the rest."""
        writer = threading.Thread(target=self._write)
        writer.start()
        began = time.monotonic()
        try:
            self.calls.rest(self.work)
        finally:
            took = time.monotonic() - began
            self._done.set()
            writer.join()
        return took

    def _write(self) -> None:
        while self._writes and not self._done.wait(0.005):
            self.guest.disk.device_written += MIB


def test_it_rests_in_proportion_while_others_write() -> None:
    assert Bench("low", writes=True).rests() >= 1.5
    assert 0.15 <= Bench("normal", writes=True).rests() <= 1.0
    assert Bench("high", writes=True).rests() <= 0.1


def test_it_does_not_rest_where_nobody_writes() -> None:
    assert Bench("low", writes=False).rests() <= 0.8


def test_a_cancel_ends_the_rest() -> None:
    bench = Bench("low", writes=True)
    bench.work.stop.set()
    assert bench.rests() <= 0.5


@pytest.mark.parametrize("best_effort", [False, True])
def test_it_rests_between_steps_and_holds_nothing(best_effort: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()
    guest.disk.write(3 * GIB)
    guest.disk.delete(GIB)
    guest.engine.hold(GIB)
    rests, free = 0, []

    def take() -> None:
        free.append(guest.engine.lock.acquire(timeout=1))
        if free[-1]:
            guest.engine.lock.release()

    def look(calls: KernelCalls, _work: Work) -> None:
        nonlocal rests
        rests += calls._worked_s > 0
        calls._worked_s = 0.0
        taken = threading.Thread(target=take)
        taken.start()
        taken.join()

    monkeypatch.setattr(KernelCalls, "rest", look)
    for chunk in guest.disk.of("data"):
        chunk.used = max(chunk.used, 64 * MIB)
    guest.run(guest.minimum(), best_effort=best_effort)
    assert rests > 0
    assert all(free)
