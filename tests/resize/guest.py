"""A simulated guest whose resize jobs can be run, one after the other."""

from __future__ import annotations

from hypothesis import strategies as st

from storaged.balloon.engine import BalloonEngine
from storaged.core import events as ev
from storaged.resize.bounds import compute
from storaged.resize.job import Job, JobState
from storaged.resize.runner import ResizeRunner
from storaged.resize.work import Tell
from storaged.sim import SimDisk, make_world
from storaged.units import GIB

Turns = list[tuple[str, int]]
TURNS = st.lists(st.tuples(st.sampled_from(["write", "delete", "hold"]), st.integers(0, 8 * GIB)), max_size=10)


class Guest:
    """A simulated filesystem, its balloon and its runner."""

    def __init__(self, size: int = 8 * GIB) -> None:
        self.disk = SimDisk(size, device=2 * size)
        self.world = make_world(self.disk)
        self.engine = BalloonEngine(self.world.filesystem, self.world.balloon, self.world.preallocated)
        self.runner = ResizeRunner(
            self.world.filesystem, self.world.resizer, self.engine, self.world.clock, poll_s=0.005
        )
        self.told: list[ev.Event] = []
        self.settled = 0

    def settle(self) -> None:
        """What the daemon does before the last word."""
        assert not any(isinstance(event, ev.JobEnded) for event in self.told)
        self.settled += 1

    def run(self, size: int, tell: Tell | None = None, *, best_effort: bool = False) -> ev.JobEnded:
        """A job to `size`; its end."""
        self.told.clear()
        job = Job("a", size, self.disk.size, self.disk.size, JobState.PREPARING, best_effort=best_effort)
        self.runner.run(job, tell or self.told.append, self.settle)
        last = self.told[-1]
        assert isinstance(last, ev.JobEnded)
        assert sum(isinstance(event, ev.JobEnded) for event in self.told) == 1
        assert last.current_size == self.disk.size
        return last

    def minimum(self) -> int:
        """The bound that hosts are told."""
        return compute(self.engine.layout(), self.engine.longest()).minimum


def aged(size: int, turns: Turns) -> Guest:
    """A filesystem that has lived through `turns`."""
    guest = Guest(size)
    for what, amount in turns:
        if what == "hold":
            guest.engine.hold(amount)
        else:
            getattr(guest.disk, what)(amount)
    return guest
