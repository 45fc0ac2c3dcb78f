"""One guest: the real engine on the simulation, under a schedule. What can happen to it, and what must hold."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from storaged.balloon import target
from storaged.core import events as ev
from storaged.core.model import Config, KernelReclaim, Told
from storaged.core.state import State
from storaged.errors import StoragedError
from storaged.resize.job import Job
from storaged.runtime import StorageService
from storaged.sim import MemoryJournal, SimClock, SimDisk, SimSysctl, make_world
from storaged.units import GIB, sector_floor
from tests.sim.schedule import Schedule

KERNELS = KernelReclaim(threshold=75)


class Driver:
    """One guest. Every public method is a thing that can happen to it; `check` says whether it is still right."""

    def __init__(self, config: Config, size: int = 4 * GIB) -> None:
        self.config = config
        self.clock = SimClock()
        self.random = random.Random(0)
        self.schedule = Schedule(self.clock, self._choose)
        self.disk = SimDisk(size, device=2 * size)
        self.disk.kernel_reclaim = KERNELS
        self.sysctl = SimSysctl(faults=self.disk.faults)
        self.original = self.sysctl.limits
        self.journal = MemoryJournal(self.disk.faults)
        self.accepted: set[str] = set()
        self.ended: dict[str, str] = {}
        self.posted = 0
        self.disturbed = 0
        """Counts what makes room without the daemon's doing: until its next look that can be written."""
        self.asked: set[asyncio.Task[Any]] = set()
        self.boot()

    def _choose(self, count: int) -> int:
        return self.random.randrange(count)

    @property
    def state(self) -> State:
        """As the daemon publishes it."""
        return self.service.snapshot.state

    @property
    def held(self) -> int:
        """Bytes that the balloon holds."""
        return sum(chunk.held for chunk in self.disk.chunks)

    # --- what happens ---------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start the daemon on what is there; what goes wrong by itself ends with the machine."""
        self.disk.faults.clear()
        world = make_world(self.disk, clock=self.clock, sysctl=self.sysctl, journal=self.journal)
        self.service = StorageService(world, self.config)
        self.service.observe(self._observe)
        self._boots = True
        self.schedule.ends(self._task(self.service.start()))
        self._boots = False

    def power_cut(self) -> None:
        """The machine stops wherever each of its threads is, and starts again."""
        self._let_go()
        self.disk.exclusive_operation = "none"
        self.disk.freed = 0  # and not trimmed: nobody knows of it any more
        running = self.accepted - set(self.ended)
        self.boot()
        remembered = {self.state.job.id} if self.state.job is not None else set()
        self.accepted -= running - remembered  # begun, and not yet in the journal

    def run(self, turns: int, seed: int) -> None:
        """So many turns of whoever the seed says; time stands."""
        self.random.seed(seed)
        self.schedule.run(turns)

    def rest(self) -> None:
        """Until everybody waits for time."""
        self.schedule.rest()

    def sleep(self, seconds: float) -> None:
        """Time passes."""
        self.schedule.rest(self.clock.now + seconds)

    def report(self, told: Told, free: int) -> asyncio.Task[str]:
        """UpdateStorageBalloon, its answer."""
        self.posted += told is not Told.NONE and free >= 0
        return self._task(self._report(told, free, self.posted, self.disturbed))

    async def _report(self, told: Told, free: int, number: int, disturbed: int) -> str:
        reason = await self.service.report(told, free)
        if not reason and told is not Told.NONE and free >= 0 and (number, disturbed) == (self.posted, self.disturbed):
            self.within(max(free - self.config.reserve, 0))
            assert self.saved()["limit"] == self.state.balloon.limit, "and durable"
        return reason

    def resize(self, size: int, *, best_effort: bool = False) -> asyncio.Task[None]:
        """ResizeFilesystem."""
        return self._task(self._resize(size, best_effort=best_effort))

    async def _resize(self, size: int, *, best_effort: bool) -> None:
        try:
            await self.service.resize(size, best_effort=best_effort)
        except StoragedError:
            return  # refused, in words

    def cancel(self) -> asyncio.Task[None]:
        """CancelResize."""
        return self._task(self._quietly(self.service.cancel))

    def release(self) -> asyncio.Task[None]:
        """Give everything back."""
        self.posted += 1
        self.disturbed += 1
        return self._task(self._quietly(self.service.release))

    def trim(self, *, reclaim: bool) -> asyncio.Task[None]:
        """Trim."""
        return self._task(self._quietly(partial(self.service.trim, reclaim=reclaim)))

    async def _quietly(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        try:
            await asyncio.wait_for(work(), 60)
        except (StoragedError, TimeoutError):
            return  # refused, in words, or for too long

    def capacity(self, device: int) -> None:
        """The host makes the device as large, and the guest hears of it."""
        self.disk.set_device(max(device, self.disk.size))
        self.schedule.loop.call_soon(self.service.capacity_changed)

    def suspend(self) -> asyncio.Task[None]:
        """PrepareToSuspend."""
        return self._task(self._quietly(self.service.suspend))

    def _let_go(self) -> None:
        self.asked.clear()
        self.service._stopped = True  # its end is no fault
        self.schedule.kill()

    def close(self) -> None:
        """Nothing of it is left."""
        self._let_go()
        self.schedule.close()

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.schedule.loop.create_task(work)
        self.asked.add(task)
        return task

    # --- what must hold ---------------------------------------------------------------------------------------

    def _observe(self, _event: ev.Event, state: State) -> None:
        job = state.job
        if job is None:
            return
        self.accepted.add(job.id)
        if not job.active:
            self._end(job, again=self._boots)
        else:
            assert job.id not in self.ended, "what has ended does not go on"

    def _end(self, job: Job, *, again: bool) -> None:
        if again:  # an end that was not in the journal yet comes again, and may be another
            self.ended.pop(job.id, None)
        assert self.ended.setdefault(job.id, job.state.value) == job.state.value, "a job ends once"
        if job.state.value == "done" and not job.best_effort:
            assert job.current_size == job.requested

    def saved(self) -> dict[str, Any]:
        """What the journal says."""
        record: dict[str, Any] = json.loads(self.journal.text or "{}")
        return record

    def within(self, limit: int) -> None:
        """Applications can write what they may, and a chunk more at most; two while a shrink cuts chunks away.

        What a best effort or a grow adds for a moment is there until the balloon has it (docs/promise.md).
        """
        space, job = self.service.world.filesystem.space(), self.state.active_job
        most = target.ceiling(space, limit)
        if job is not None:
            if job.best_effort or not job.shrinks:
                return
            most += space.data_chunk
        assert space.available <= most, f"{space.available} can be written, {limit} are allowed, {most} at most"

    def check(self) -> None:
        """What is true at every moment, wherever each thread is."""
        assert all(chunk.used >= 0 and chunk.held >= 0 and chunk.free >= 0 for chunk in self.disk.chunks)
        assert all(chunk.start + chunk.length <= self.disk.size for chunk in self.disk.chunks)
        assert sector_floor(self.disk.size) == self.disk.size
        assert not self.schedule.loop.failures
        assert not self.service.snapshot.faults, self.service.snapshot.notes
        for task in [task for task in self.asked if task.done()]:
            self.asked.remove(task)
            task.result()
        job = self.state.job  # published before the observers hear of its end
        assert self.accepted - set(self.ended) <= ({job.id} if job is not None else set())
        # Whatever changed the machine is in the journal: killed here, the next start puts it back.
        saved = self.saved()
        if self.sysctl.limits != self.original:
            assert saved.get("dirty_found"), "the limits were lowered before those found were saved"
        if self.disk.kernel_reclaim != KERNELS:
            assert saved.get("reclaim_found"), "the kernel's reclaim was turned off before it was saved"
