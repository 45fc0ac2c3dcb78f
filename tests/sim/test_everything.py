"""Whatever happens in whatever order, faults and crashes at any point included: what must hold, holds."""

from __future__ import annotations

import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storaged.core.model import Config, Level, Told
from storaged.errors import FilesystemError, Kind
from storaged.units import GIB, MIB
from tests.sim.driver import Crash, Driver

frees = st.integers(0, 8 * GIB) | st.sampled_from([0, GIB, 2 * GIB, 3 * GIB, 4 * GIB])
ERRORS = [
    FilesystemError("no room", errno.ENOSPC),
    FilesystemError("over quota", errno.EDQUOT),
    FilesystemError("broken", errno.EIO),
    FilesystemError("busy", errno.EBUSY, Kind.BUSY),
]


class Everything(RuleBasedStateMachine):
    """All that can happen to one guest."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(Config())

    @rule(told=st.sampled_from(Told), free=frees)
    def report(self, told: Told, free: int) -> None:
        limit = self.driver.state.balloon.limit
        answer = self.driver.report(told, free)
        if told is Told.NONE and not self.driver.crashes:
            assert answer == ""
            assert self.driver.state.balloon.limit == limit

    @rule(free=st.integers(-(1 << 63), -1), told=st.sampled_from(Told))
    def report_nothing(self, free: int, told: Told) -> None:
        limit, level = self.driver.state.balloon.limit, self.driver.state.pressure.level
        held = self.driver.engine.size()
        self.driver.report(told, free)
        if self.driver.crash_in is None:
            assert self.driver.state.balloon.limit == limit
            assert self.driver.state.pressure.level is level
            assert self.driver.engine.size() == held

    @rule(size=st.integers(0, 9 * GIB) | st.sampled_from([2 * GIB, 4 * GIB, 8 * GIB, 256 * MIB]))
    def resize(self, size: int) -> None:
        self.driver.resize(size)

    @rule()
    def resize_to_the_bound(self) -> None:
        bounds = self.driver.engine.layout()
        top = max((chunk.top for chunk in bounds.chunks if not chunk.vacant), default=0)
        self.driver.resize(max(-(-top // 4096) * 4096, 256 * MIB))

    @rule()
    def cancel(self) -> None:
        self.driver.cancel()

    @rule(device=st.integers(1, 12).map(lambda n: n * GIB))
    def capacity(self, device: int) -> None:
        self.driver.capacity(device)

    @rule(seconds=st.sampled_from([0.25, 1.0, 5.0, 30.0, 120.0]))
    def sleep(self, seconds: float) -> None:
        self.driver.sleep(seconds)

    @rule()
    def suspend(self) -> None:
        self.driver.suspend()

    @rule(size=st.integers(0, 4 * GIB))
    def write(self, size: int) -> None:
        written = self.driver.disk.write(size)
        assert written <= size

    @rule(size=st.integers(0, 4 * GIB))
    def delete(self, size: int) -> None:
        self.driver.disk.delete(size)

    @rule(room=st.integers(4, 200).map(lambda n: n * MIB))
    def metadata(self, room: int) -> None:
        for chunk in self.driver.disk.of("metadata"):
            chunk.used = max(chunk.length - room, 0)

    @rule(
        operation=st.sampled_from(["extend", "shrink", "sync", "trim", "resize", "set_dirty_limits"]),
        error=st.sampled_from(ERRORS),
        times=st.integers(1, 3),
    )
    def fault(self, operation: str, error: FilesystemError, times: int) -> None:
        if operation == "resize" and error.kind is Kind.BUSY:
            return  # waits in real time
        self.driver.disk.faults.fail(operation, error, times)

    @precondition(lambda self: self.driver.crash_in is None)
    @rule(effects=st.integers(0, 6))
    def crash_soon(self, effects: int) -> None:
        self.driver.crash_after(effects)

    @rule(operation=st.sampled_from(["extend", "shrink", "sync", "resize", "trim", "save"]))
    def crash_inside(self, operation: str) -> None:
        self.driver.disk.faults.fail(operation, Crash())  # type: ignore[arg-type]  # a crash is no error

    @rule()
    def power_cut(self) -> None:
        limit = self.driver.state.balloon.limit
        self.driver.power_cut()
        assert self.driver.state.balloon.limit == limit
        if limit is not None and not self.driver.state.balloon.reason:
            self.driver.within(limit)

    @rule()
    def the_pressure_goes(self) -> None:
        """Faults and pressure end; a while later nothing of the daemon is left but what it was asked for."""
        driver = self.driver
        driver.disk.faults.clear()
        driver.crash_in = None
        for _ in range(3):  # from CRITICAL to LOW to NORMAL, each after its time
            driver.report(Told.NORMAL, 64 * GIB)
            driver.sleep(60)
        assert driver.engine.size() == 0
        assert driver.state.pressure.level is Level.NORMAL
        assert driver.state.active_job is None
        assert driver.sysctl.limits == driver.original
        assert driver.state.dirty_found is None

    @invariant()
    def holds(self) -> None:
        self.driver.check()

    def teardown(self) -> None:
        self.driver.disk.faults.clear()
        self.driver.crash_in = None
        self.driver.power_cut()
        self.holds()
        self.the_pressure_goes()


TestEverything = Everything.TestCase
TestEverything.settings = settings(max_examples=80, stateful_step_count=30)
