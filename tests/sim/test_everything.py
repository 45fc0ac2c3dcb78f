"""Whatever happens in whatever order, and wherever each thread is then: what must hold, holds.

The real engine with its queue and its threads, under a schedule that the test chooses: a report may meet a shrink, a
cancel, a trim, a release, a fault of any port or the end of the machine between any two calls.
"""

from __future__ import annotations

import errno
import random

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from storaged.core.model import Config, Level, Told
from storaged.errors import FilesystemError, Kind
from storaged.units import GIB, MIB
from tests.sim.driver import KERNELS, Driver

frees = st.integers(0, 8 * GIB) | st.sampled_from([0, GIB, 2 * GIB, 3 * GIB, 4 * GIB])
told = st.sampled_from([Told.NORMAL, Told.LOW, Told.CRITICAL])
seeds = st.integers(0, 1 << 16)
turns = st.sampled_from([0, 3, 10, 30, 100, 300])
SIZES = [2 * GIB, 3 * GIB, 4 * GIB, 8 * GIB, 256 * MIB]
ERRORS = [
    FilesystemError("no room", errno.ENOSPC),
    FilesystemError("over quota", errno.EDQUOT),
    FilesystemError("broken", errno.EIO),
    FilesystemError("busy", errno.EBUSY, Kind.BUSY),
]
PORTS = [
    *("extend", "shrink", "remove", "sync", "trim", "resize", "space", "device_size", "set_dirty_limits", "save"),
    *("set_kernel_reclaim", "reclaim_empty_chunks", "grow_metadata", "look", "move_out"),
]


class Everything(RuleBasedStateMachine):
    """All that can happen to one guest."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(Config())

    # --- what others ask for; then so many turns, of whoever the seed says

    @rule(told=st.sampled_from(Told), free=frees | st.integers(-(1 << 63), -1), turns=turns, seed=seeds)
    def report(self, told: Told, free: int, turns: int, seed: int) -> None:
        self.driver.report(told, free)
        self.driver.run(turns, seed)

    @rule(told=told, free=frees, seed=seeds)
    def report_and_wait(self, told: Told, free: int, seed: int) -> None:
        self.driver.random.seed(seed)
        self.driver.schedule.ends(self.driver.report(told, free))

    @rule(size=st.integers(0, 9 * GIB) | st.sampled_from(SIZES), best=st.booleans(), turns=turns, seed=seeds)
    def resize(self, size: int, best: bool, turns: int, seed: int) -> None:
        self.driver.resize(size, best_effort=best)
        self.driver.run(turns, seed)

    @rule(turns=turns, seed=seeds)
    def resize_to_the_bound(self, turns: int, seed: int) -> None:
        chunks = [chunk for chunk in self.driver.disk.chunks if chunk.used]
        top = max((chunk.start + chunk.length for chunk in chunks), default=0)
        self.driver.resize(max(-(-top // 4096) * 4096, 256 * MIB))
        self.driver.run(turns, seed)

    @rule(what=st.sampled_from(["cancel", "release", "trim", "reclaim", "suspend"]), turns=turns, seed=seeds)
    def ask(self, what: str, turns: int, seed: int) -> None:
        match what:
            case "cancel":
                self.driver.cancel()
            case "release":
                self.driver.release()
            case "suspend":
                self.driver.suspend()
            case _:
                self.driver.trim(reclaim=what == "reclaim")
        self.driver.run(turns, seed)

    @rule(device=st.integers(1, 12).map(lambda n: n * GIB), turns=turns, seed=seeds)
    def capacity(self, device: int, turns: int, seed: int) -> None:
        self.driver.capacity(device)
        self.driver.run(turns, seed)

    # --- what applications do, and the machine

    @rule(size=st.integers(0, 4 * GIB))
    def write(self, size: int) -> None:
        assert self.driver.disk.write(size) <= size

    @rule(size=st.integers(0, 4 * GIB))
    def delete(self, size: int) -> None:
        self.driver.disturbed += 1
        self.driver.disk.delete(size)

    @rule(room=st.integers(4, 200).map(lambda n: n * MIB))
    def metadata(self, room: int) -> None:
        for chunk in self.driver.disk.of("metadata"):
            chunk.used = max(chunk.length - room, 0)

    @rule(operation=st.sampled_from(PORTS), error=st.sampled_from(ERRORS), times=st.integers(1, 8))
    def fault(self, operation: str, error: FilesystemError, times: int) -> None:
        self.driver.disk.faults.fail(operation, error, times)

    @rule(times=st.integers(1, 8))
    def the_journal_cannot_be_saved(self, times: int) -> None:
        self.driver.disk.faults.fail("save", ERRORS[0], times)

    @rule(cuts=st.booleans())
    def power_cut(self, cuts: bool) -> None:
        if not cuts:  # less often than the rest: what was asked for is gone
            return
        limit = self.driver.saved().get("limit")
        self.driver.power_cut()
        assert self.driver.state.balloon.limit == limit or limit is None

    # --- who goes on

    @rule(seed=seeds)
    def rest(self, seed: int) -> None:
        self.driver.random.seed(seed)
        self.driver.rest()

    @rule(seconds=st.sampled_from([0.02, 0.25, 1.0, 5.0, 30.0]), seed=seeds)
    def sleep(self, seconds: float, seed: int) -> None:
        self.driver.random.seed(seed)
        self.driver.sleep(seconds)

    def the_pressure_goes(self) -> None:
        """Faults and pressure end; a while later nothing of the daemon is left but what it was asked for."""
        driver = self.driver
        driver.disk.faults.clear()
        driver.sleep(30)
        for _ in range(3):  # from CRITICAL to LOW to NORMAL, each after its time
            answer = driver.schedule.ends(driver.report(Told.NORMAL, 64 * GIB))
            assert answer == "" or driver.disk.read_only, answer
            driver.sleep(60)
        assert driver.state.active_job is None
        assert driver.state.pressure.level is Level.NORMAL
        assert driver.sysctl.limits == driver.original
        assert driver.state.dirty_found is None
        assert not driver.held or driver.disk.read_only
        driver.schedule.ends(driver.release())
        assert driver.disk.kernel_reclaim == KERNELS

    @invariant()
    def holds(self) -> None:
        self.driver.check()

    def teardown(self) -> None:
        try:
            self.driver.power_cut()
            self.holds()
            self.the_pressure_goes()
            self.holds()
        finally:
            self.driver.close()


TestEverything = Everything.TestCase
TestEverything.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # to make one smaller takes minutes: `--hypothesis-seed` repeats it
)


def test_the_same_seed_is_the_same_schedule() -> None:
    told = []
    for _ in range(2):
        driver = Driver(Config())
        try:
            seen: list[str] = []
            driver.service.observe(lambda event, _, seen=seen: seen.append(type(event).__name__))  # type: ignore[misc]
            driver.report(Told.LOW, 2 * GIB)
            driver.resize(2 * GIB)
            driver.report(Told.NORMAL, 3 * GIB)
            driver.run(400, 7)
            driver.random = random.Random(3)
            driver.sleep(5)
            told.append(seen)
        finally:
            driver.close()
    assert told[0] == told[1]
    assert len(told[0]) > 5
