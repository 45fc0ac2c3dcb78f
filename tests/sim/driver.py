"""The daemon without its event loop: steps the core and runs its effects one after the other on the simulation.

A crash can strike at any effect, and inside the ones that work on the disk; what is left then is what a real crash
leaves: the disk, the write-back limits, the journal.
"""

from __future__ import annotations

import contextlib
from collections import deque

from storaged.balloon import target
from storaged.balloon.engine import BalloonEngine
from storaged.core import events as ev
from storaged.core.machine import next_wakeup, step
from storaged.core.model import Config, DirtyLimits, HostReport, KernelReclaim, Told
from storaged.core.record import from_record, to_record
from storaged.core.state import State
from storaged.errors import FilesystemError
from storaged.resize.bounds import compute
from storaged.resize.job import Job
from storaged.resize.runner import ResizeRunner
from storaged.sim import MemoryJournal, SimClock, SimDisk, SimSysctl, make_world
from storaged.units import GIB, sector_floor


class Crash(BaseException):
    """The machine stops here."""


class Driver:
    """One guest. Every public method is a thing that can happen to it; `check` says whether it is still right."""

    def __init__(self, config: Config, size: int = 4 * GIB) -> None:
        self.config = config
        self.disk = SimDisk(size, device=2 * size)
        self.sysctl = SimSysctl(faults=self.disk.faults)
        self.original = self.sysctl.limits
        self.journal = MemoryJournal(self.disk.faults)
        self.clock = SimClock()
        self.crash_in: int | None = None
        self.answers: list[str] = []
        self.promised: int | None = None
        self.accepted: list[str] = []
        self.ended: list[str] = []
        self.crashes = 0
        self._number = 0
        self.boot()

    # --- what happens ---------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start the daemon on what is there."""
        world = make_world(self.disk, clock=self.clock, sysctl=self.sysctl, journal=self.journal)
        self.world = world
        self.engine = BalloonEngine(world.filesystem, world.balloon, world.preallocated)
        self.runner = ResizeRunner(world.filesystem, world.resizer, self.engine, world.clock, poll_s=10)
        self.state = State(self.config)
        self._queue: deque[ev.Event] = deque()
        record = self.journal.load()
        known = from_record(record, self.clock.now) if record is not None else None
        space = world.filesystem.space()
        found = ev.Recovered(
            size=space.size,
            device=space.device,
            available=space.available,
            balloon=self.engine.size(),
            at=self.clock.now,
            wall=self.clock.wall(),
            limit=known.limit if known else None,
            level=known.level if known else None,
            report=known.report if known else None,
            dirty_found=known.dirty_found if known else None,
            reclaim_found=known.reclaim_found if known else None,
            job=known.job if known else None,
        )
        was_active = known is not None and known.job is not None and known.job.active
        if was_active and found.job is not None and found.job.id in self.ended:
            self.ended.remove(found.job.id)  # that end was not on record yet; it comes again
        self._send(found)
        job = self.state.job
        if was_active and job is not None and not job.active and job.id not in self.ended:
            self._end(job)

    def crash_after(self, effects: int) -> None:
        """The machine will stop once so many more effects have been begun."""
        self.crash_in = effects

    def report(self, told: Told, free: int) -> str | None:
        """UpdateStorageBalloon; the answer, or None when the machine stopped first."""
        count = len(self.answers)
        self._send(ev.HostReported(HostReport(told, free, self.clock.now, self.clock.wall())))
        return self.answers[-1] if len(self.answers) > count else None

    def resize(self, size: int) -> None:
        """ResizeFilesystem."""
        self._number += 1
        space = self.world.filesystem.space()
        bounds = compute(self.engine.layout(), self.engine.longest())
        facts = ev.Facts(space.size, space.device, bounds.minimum, bounds.why, space.read_only)
        name = f"job {self._number}"
        self._send(ev.ResizeRequested(size, name, facts, self.clock.now, self.clock.wall()))

    def cancel(self) -> None:
        """CancelResize."""
        self._send(ev.CancelRequested(self.clock.now, self.clock.wall()))

    def capacity(self, device: int) -> None:
        """The host makes the device as large, and the guest hears of it."""
        self.disk.set_device(max(device, self.disk.size))
        self._send(ev.CapacityChanged(self.disk.device, self.clock.now, self.clock.wall()))

    def suspend(self) -> None:
        """PrepareToSuspend."""
        self._send(ev.SuspendRequested(self.clock.now))

    def sleep(self, seconds: float) -> None:
        """Time passes; the daemon wakes whenever it said that it would."""
        until = self.clock.now + seconds
        last = None
        while (at := next_wakeup(self.state)) is not None and at <= until:
            assert last is None or at > last, "woken twice for the same"
            last = at
            self.clock.now = max(at, self.clock.now)
            if self.state.poll_at is not None and self.clock.now >= self.state.poll_at:
                self._send(ev.CapacityChanged(self.disk.device, self.clock.now, self.clock.wall()))
            else:
                self._send(ev.Tick(self.clock.now, self.clock.wall()))
        self.clock.now = until

    def power_cut(self) -> None:
        """The machine stops between two events, and starts again."""
        self._restart()

    # --- the writer -------------------------------------------------------------------------------------------

    def _send(self, event: ev.Event) -> None:
        self._queue.append(event)
        try:
            while self._queue:
                self._process(self._queue.popleft())
        except Crash:
            self._restart()

    def _restart(self) -> None:
        self.crashes += 1
        self.crash_in = None
        self.disk.faults.clear()
        self.disk.exclusive_operation = "none"
        self.boot()

    def _process(self, event: ev.Event) -> None:
        before = self.state.active_job
        self.state, effects = step(self.state, event)
        job = self.state.job
        if before is not None and job is not None and not job.active:
            self._end(job)
        for effect in effects:
            if self.crash_in is not None:
                self.crash_in -= 1
                if self.crash_in < 0:
                    raise Crash
            with contextlib.suppress(FilesystemError):  # the daemon notes it
                self._perform(effect)

    def _end(self, job: Job) -> None:
        assert job.id not in self.ended, "a job ends once"
        self.ended.append(job.id)

    def _perform(self, effect: ev.Effect) -> None:  # noqa: C901, PLR0912  # one arm an effect, as in the daemon
        clock, fs = self.clock, self.world.filesystem
        match effect:
            case ev.HoldAvailable(limit, fresh):
                self._hold(limit, fresh)
            case ev.Sample(adjust):
                done = self.engine.sample(self.config.reserve, adjust=adjust)
                self._queue.append(ev.BalloonSampled(done.size, done.relief, clock.now, done.tight))
            case ev.Trim():
                fs.trim()
            case ev.SetDirtyLimits(size):
                self._process(ev.DirtyLimitsFound(self.sysctl.dirty_limits()))
                self.sysctl.set_dirty_limits(DirtyLimits(size, size // 2, 0, 0))
            case ev.RestoreDirtyLimits(limits):
                self.sysctl.set_dirty_limits(limits)
                self._process(ev.DirtyLimitsRestored())
            case ev.RuleOutReclaim():
                if (reclaim := fs.kernel_reclaim()).active:
                    self._process(ev.ReclaimFound(reclaim))
                    fs.set_kernel_reclaim(KernelReclaim())
            case ev.RestoreReclaim(settings):
                fs.set_kernel_reclaim(settings)
                self._process(ev.ReclaimRestored())
            case ev.StartResize(job):
                self.runner.run(job, self._queue.append, self._settle)
            case ev.CancelResize(job_id):
                self.runner.cancel(job_id)
            case ev.Sync():
                fs.sync()
            case ev.Save():
                self.journal.save(to_record(self.state))
            case ev.AnswerReport(reason):
                self._answer(reason)
            case ev.IgnoreReport():
                self.answers.append("")
            case ev.AcceptResize(already):
                if not already:
                    assert self.state.job is not None
                    self.accepted.append(self.state.job.id)
            case _:
                pass

    def _hold(self, limit: int | None, fresh: bool) -> None:
        try:
            held = self.engine.hold(limit, fresh=fresh)
            self._queue.append(
                ev.BalloonSettled(limit, held.size, self.clock.now, target.tight(held.space), held.again)
            )
        except FilesystemError as error:
            self._queue.append(ev.BalloonFailed(limit, self.engine.size(), error.message, self.clock.now))

    def _settle(self) -> None:
        if self.state.balloon.limit is not None:
            try:
                self.engine.hold(self.state.balloon.limit, fresh=False)
            except FilesystemError:
                return

    def _answer(self, reason: str) -> None:
        self.answers.append(reason)
        if not reason:
            self.promised = self.state.balloon.limit
            self.within(self.promised)

    # --- what must hold ---------------------------------------------------------------------------------------

    def within(self, limit: int | None) -> None:
        """Applications can write what they may, and a chunk more at most."""
        assert limit is not None
        space = self.world.filesystem.space()
        assert space.available <= target.ceiling(space, limit)

    def check(self) -> None:
        """What is true at every moment between two events."""
        assert self.engine.size() >= 0
        assert all(chunk.used >= 0 and chunk.held >= 0 and chunk.free >= 0 for chunk in self.disk.chunks)
        assert all(chunk.start + chunk.length <= self.disk.size for chunk in self.disk.chunks)
        assert len(self.accepted) == len(set(self.accepted))
        assert len(self.ended) == len(set(self.ended))
        running = set(self.accepted) - set(self.ended)
        active = self.state.active_job
        assert running == ({active.id} if active is not None else set())
        if self.state.job is not None and self.state.job.state.value == "done" and active is None:
            assert self.state.job.current_size == self.state.job.requested
        if self.state.dirty_found is not None:
            assert self.state.dirty_found == self.original
        if self.promised is not None:
            assert self.state.balloon.limit is not None, "what was promised is not forgotten"
        assert sector_floor(self.disk.size) == self.disk.size
