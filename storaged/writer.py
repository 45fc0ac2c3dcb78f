"""The one writer: a task that owns the storage state, steps the core and runs its effects.

Every event comes through one queue. Reads take the last published state and wait for nobody. Effects that block
run in threads: one for the balloon, one for the resize, one for the rest; what they find comes back as events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from storaged.balloon import balance
from storaged.balloon.engine import BalloonEngine, Superseded
from storaged.balloon.grant import Grant
from storaged.balloon.target import calm, tight
from storaged.core import events as ev
from storaged.core import machine
from storaged.core.model import Config, DirtyLimits, KernelReclaim, Space, Unwritten
from storaged.core.ports import World
from storaged.core.record import to_record
from storaged.core.state import State
from storaged.errors import FilesystemError, Kind, StoragedError
from storaged.resize.bounds import Bounds
from storaged.resize.job import Job
from storaged.resize.runner import ResizeRunner
from storaged.units import MIB

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 15.0
"""A host gives 20 s: an answer must go out in time whatever the disk does."""
REST_AFTER_A_FAULT_S = 1.0
"""What waits for time waits so long after a fault of ours: it may be what met it, and would at once meet it again."""
MOST_NOTES = 64
COUNT_PATIENCE_S = 0.5
COUNT_AGAIN = 16 * MIB
"""Data written or deleted after which preallocated extents are counted again, without a report of the host."""
_KEEP_CHUNKS = False
_THREADS = ("balloon", "resize", "cancel", "upkeep", "read", "count", "bounds", "state")
"""What may wait for what: the journal and the limits never wait for a trim, nor a read for either, nor that for
bounds, which wait for a balloon or a shrink at work."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What readers see: the core's state, and the last space that was read."""

    sequence: int
    state: State
    space: Space
    bounds: Bounds | None
    notes: tuple[str, ...]
    balloon_target: int
    grant: Grant | None
    unwritten: Unwritten
    reach: int
    """Bytes that the guest can still make the host's disk grow by."""
    potential: int
    """Bytes of the host's disk that the guest holds and can still take."""
    inflated_total: int
    deflated_total: int
    moved_total: int
    faults: int
    """Events and effects that failed by a fault of storaged."""
    wall: float


@dataclass(slots=True)
class _Waiting:
    reports: list[asyncio.Future[str]] = field(default_factory=list)
    job_ends: dict[str, asyncio.Future[Job]] = field(default_factory=dict)


Observer = Callable[[ev.Event, State], None]


class Writer:
    """The state of one filesystem's storage and its only writer. `runtime.StorageService` is what others use."""

    def __init__(self, world: World, config: Config | None = None) -> None:
        self._world = world
        self._state = State(config or Config())
        self._engine = BalloonEngine(world.filesystem, world.balloon, world.preallocated)
        self._runner = ResizeRunner(
            world.filesystem,
            world.resizer,
            self._engine,
            world.clock,
            poll_s=world.poll_s,
            impact=lambda: self._state.config.resize_impact,
        )
        self._queue: asyncio.Queue[tuple[ev.Event, asyncio.Future[Any] | None]] = asyncio.Queue()
        self._waiting = _Waiting()
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in _THREADS}
        self._notes: deque[str] = deque(maxlen=MOST_NOTES)
        self._observers: list[Observer] = []
        self._changed = asyncio.Event()
        self._retargeting = asyncio.Lock()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._writer: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._holding = False
        self._hold_next: list[tuple[int | None, bool]] = []
        self._trimming = False
        self._closing = self._stopped = False
        self._halted = ""
        self._counted_with = 0
        self._unsaved = ""
        """Why the journal could not be written the last time; empty when it was."""
        self._put_off: int | None = None
        """A write-back limit, in bytes, that is set once those found are saved."""
        self._faults = 0
        self._rest_until = 0.0
        self._moved_total = 0
        self._bounds: Bounds | None = None
        self._bounds_for: Space | None = None
        self._lately: asyncio.Future[None] | None = None
        self._snapshot: Snapshot | None = None

    @property
    def snapshot(self) -> Snapshot:
        """The last published state; costs nothing."""
        assert self._snapshot is not None, "start() comes first"
        return self._snapshot

    def reach(self, space: Space) -> int:
        """Host bytes that the guest can still take by any kind of write."""
        return self._engine.reach(space)

    @property
    def unsaved(self) -> str:
        """Why the journal could not be written the last time; empty when it was."""
        return self._unsaved

    @property
    def world(self) -> World:
        """The ports in use."""
        return self._world

    def observe(self, observer: Observer) -> None:
        """Call `observer(event, state)` after every step, on the event loop."""
        self._observers.append(observer)

    # --- the task

    def _begin(self) -> None:
        self._writer = asyncio.create_task(self._run(), name="storage writer")
        self._writer.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The state is whole between two events: another task can go on with it."""
        if self._stopped or task.get_loop().is_closed():
            return
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        self._fault("the engine's writer ended and begins again: it", error)
        self._begin()

    async def _run(self) -> None:
        while not self._stopped:
            try:
                event, waiter = await self._next()
            except (StoragedError, OSError) as error:
                self._rest()
                self._note_once(f"looking at the device failed: {error}")
                continue
            try:
                await self._process(event, waiter)
            except Exception as error:  # noqa: BLE001  # one broken event must not end the daemon; whoever waits is told
                self._fault(f"handling {type(event).__name__}", error)
                if waiter is not None and not waiter.done():
                    waiter.set_exception(StoragedError(f"internal error: {error!r}"))

    def _rest(self) -> None:
        self._rest_until = self._world.clock.monotonic() + REST_AFTER_A_FAULT_S

    def _fault(self, what: str, error: BaseException | None) -> None:
        """Tell, and count, what only a fault of storaged can bring about."""
        self._faults += 1
        self._rest()
        text = f"{what} failed by a fault of storaged: {error!r}"
        if text not in self._notes:
            self._notes.append(text)
            log.error("%s", text, exc_info=error)
        self._publish()

    async def _next(self) -> tuple[ev.Event, asyncio.Future[Any] | None]:
        """The next event: what waits in the queue, else a Tick or a look at the device when one is due."""
        clock = self._world.clock
        if self._queue.empty():
            wake = machine.next_wakeup(self._state)
            timeout = None if wake is None else max(max(wake, self._rest_until) - clock.monotonic(), 0.001)
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self._queue.get(), timeout)
        else:
            return self._queue.get_nowait()
        now, wall = clock.monotonic(), clock.wall()
        poll_at = self._state.poll_at
        if poll_at is not None and now >= poll_at:
            return ev.CapacityChanged(self._world.filesystem.device_size(), now, wall), None
        return ev.Tick(now, wall), None

    async def _process(self, event: ev.Event, waiter: asyncio.Future[Any] | None) -> None:
        before = self._state
        self._state, effects = machine.step(before, event)
        if isinstance(event, ev.HostReported) and waiter is not None:
            self._waiting.reports.append(waiter)
        self._publish()  # first: whoever is answered by an effect must already see what the answer says
        if self._unsaved and isinstance(event, ev.HostReported | ev.BalloonSampled) and ev.Save() not in effects:
            effects = (*effects, ev.Save())
        for effect in effects:
            try:
                await self._perform(effect, waiter)
            except (StoragedError, OSError) as error:
                self._note(f"{type(effect).__name__} failed: {error}", warning=True)
            except Exception as error:  # noqa: BLE001  # an answer may be among those that follow
                self._fault(type(effect).__name__, error)
        if waiter is not None and not waiter.done() and not isinstance(event, ev.HostReported):
            waiter.set_result(None)
        job = self._state.job
        if job is not None and not job.active:
            if before.active_job is not None:
                self._moved_total += job.moved
                self._bounds = None
            if (ended := self._waiting.job_ends.pop(job.id, None)) is not None and not ended.done():
                ended.set_result(job)
        self._publish()
        for observer in self._observers:
            try:
                observer(event, self._state)
            except Exception as error:  # noqa: BLE001  # who only looks on must not stop what it looks at
                self._fault("whoever observes the engine", error)

    def _job_end(self, job_id: str) -> asyncio.Future[Job]:
        """Done when the job has ended. Whoever waits is shielded from others who give up."""
        return self._waiting.job_ends.setdefault(job_id, asyncio.get_running_loop().create_future())

    async def _perform(  # noqa: C901, PLR0912  # one arm an effect: a table with code in it
        self, effect: ev.Effect, waiter: asyncio.Future[Any] | None
    ) -> None:
        world = self._world
        match effect:
            case ev.HoldAvailable(limit, fresh):
                self._hold(limit, fresh)
            case ev.Sample(adjust):
                await self._sample(adjust)
            case ev.Trim():
                if not self._trimming:
                    self._trimming = True
                    self._spawn(self._trim_in_background())
            case ev.SetDirtyLimits(dirty_bytes):
                await self._lower_dirty_limits(dirty_bytes)
            case ev.RestoreDirtyLimits(limits):
                self._put_off = None
                await self._in("state", world.sysctl.set_dirty_limits, limits)
                await self._process(ev.DirtyLimitsRestored(), None)
            case ev.RuleOutReclaim():
                await self._rule_out_reclaim()
            case ev.RestoreReclaim(settings):
                await self._in("state", world.filesystem.set_kernel_reclaim, settings)
                await self._process(ev.ReclaimRestored(), None)
            case ev.StartResize(job):
                self._spawn(self._in("resize", self._runner.run, job, self._tell, self._settle_after_job))
            case ev.CancelResize(job_id):
                self._spawn(self._in("cancel", self._runner.cancel, job_id))
            case ev.Sync():
                self._spawn(self._in("upkeep", world.filesystem.sync))
            case ev.Save():
                await self._save()
            case ev.Note(text, warning):
                self._note(text, warning=warning)
            case ev.AnswerReport(reason):
                for waiting in self._waiting.reports:
                    if not waiting.done():
                        waiting.set_result(reason or self._unsaved)
                self._waiting.reports.clear()
            case ev.IgnoreReport():
                if waiter is not None:
                    self._waiting.reports.remove(waiter)
                    if not waiter.done():
                        waiter.set_result("")
            case ev.AnswerCancel(job_id):
                if waiter is not None and not waiter.done():
                    # Made here, so that no end can pass between the answer and the wait for it.
                    waiter.set_result(None if job_id is None else self._job_end(job_id))
            case ev.AcceptResize() | ev.RefuseResize():
                if waiter is not None and not waiter.done():
                    waiter.set_result(effect)

    async def _lower_dirty_limits(self, size: int) -> None:
        sysctl = self._world.sysctl
        await self._process(ev.DirtyLimitsFound(await self._in("state", sysctl.dirty_limits)), None)
        self._put_off = None
        if self._unsaved:  # a crash would take the lowered ones for the machine's own
            self._put_off = size
        else:
            await self._in("state", sysctl.set_dirty_limits, DirtyLimits(size, size // 2, 0, 0))

    # --- effects that block -----------------------------------------------------------------------------------------

    def _hold(self, limit: int | None, fresh: bool) -> None:
        """One at a time; of those that wait only the newest counts."""
        if self._holding:
            # A retry must not take the place of the report whose limit it repeats.
            fresh = fresh or (limit, True) in self._hold_next
            self._hold_next = [(limit, fresh)]
            self._engine.superseded.set()
            return
        self._holding = True
        self._spawn(self._hold_until_done(limit, fresh))

    async def _hold_until_done(self, limit: int | None, fresh: bool) -> None:
        clock = self._world.clock
        while True:
            event: ev.Event | None = None
            self._engine.superseded.clear()
            try:
                held = await self._in("balloon", partial(self._engine.hold, limit, fresh=fresh))
                self._publish(held.space)
                now = clock.monotonic()
                event = ev.BalloonSettled(limit, held.size, now, tight(held.space), held.again, held.warning)
            except Superseded:
                pass  # the newer report waits below
            except Exception as error:  # noqa: BLE001  # whatever it is, the balloon is tried again
                event = ev.BalloonFailed(limit, await self._balloon_size(), str(error), clock.monotonic())
            if event is not None:
                self._post(event)
            if not self._hold_next:
                self._holding = False
                return
            limit, fresh = self._hold_next.pop()

    async def _balloon_size(self) -> int:
        try:
            return int(await self._in("balloon", self._engine.size))
        except Exception:  # noqa: BLE001  # asked for after a failure, which is what is told
            return self._state.balloon.size

    async def _sample(self, adjust: bool) -> None:
        """Costs little; the balloon's thread is asked only when there is something to do."""
        world = self._world
        space = world.filesystem.space()
        if abs(space.data_used - self._counted_with) >= COUNT_AGAIN:
            self._counted_with = space.data_used
            self._spawn(self._count())
        await self._rule_out_reclaim()  # it may have been turned on since
        warning = self._warn_of_a_balance(space)
        if self._engine.must_act(space):
            self._spawn(self._sample_and_act(adjust, warning))
            return
        now, size = world.clock.monotonic(), self._state.balloon.size
        rests = calm(space, space.metadata_headroom)
        self._post(ev.BalloonSampled(size, 0, now, tight(space), rests, warning))

    def _warn_of_a_balance(self, space: Space) -> str:
        """Of a balance that storaged did not start while the balloon is held: what it relocates is written."""
        return balance.warning(space, self._state.balloon.size) if self._state.active_job is None else ""

    async def _count(self) -> None:
        """Keep the published count of what is preallocated and not written up to date."""
        while not self._closing:
            before = self._engine.unwritten
            await self._in("count", self._engine.count, COUNT_PATIENCE_S)
            if self._engine.unwritten.size != before.size or self._engine.unwritten.known != before.known:
                self._publish()
            if self._engine.unwritten.known:
                return
            await asyncio.sleep(COUNT_PATIENCE_S)

    async def _sample_and_act(self, adjust: bool, warning: str) -> None:
        clock = self._world.clock
        try:
            done = await self._in("balloon", partial(self._engine.sample, self._state.config.reserve, adjust=adjust))
        except Exception as error:  # noqa: BLE001  # whatever it is, the space is sampled again
            self._post(ev.BalloonSampled(await self._balloon_size(), 0, clock.monotonic(), warning=str(error)))
        else:
            self._publish(done.space)
            warning = warning or done.warning
            self._post(ev.BalloonSampled(done.size, done.relief, clock.monotonic(), done.tight, warning=warning))

    async def _rule_out_reclaim(self) -> None:
        found = self._world.filesystem.kernel_reclaim()
        if found.active:
            await self._process(ev.ReclaimFound(found), None)
            if self._unsaved:
                return  # a crash would leave it off: with the next sample
            await self._in("state", self._world.filesystem.set_kernel_reclaim, KernelReclaim())

    async def _save(self) -> None:
        """Write the journal. While that fails no report is answered with SUCCESS: a crash would forget it."""
        try:
            await self._in("state", self._world.journal.save, to_record(self._state))
        except (StoragedError, OSError) as error:
            reason = f"the limit is held, but could not be saved: {error}"
            if reason != self._unsaved:
                self._note(f"the journal could not be saved: {error}", warning=True)
            self._unsaved = reason
        else:
            if self._unsaved:
                self._note("the journal is saved again")
            self._unsaved = ""
            if self._put_off is not None:
                await self._lower_dirty_limits(self._put_off)

    async def _trim_in_background(self) -> None:
        try:
            if not await self._in("read", self._world.filesystem.discard_supported):
                return  # said once, at the start
            # Empty chunks stay: a balance would relocate what is preallocated in them meanwhile, which writes it.
            event = ev.Trimmed(await self._in("upkeep", self._do_trim, _KEEP_CHUNKS))
            self._publish(await self._in("read", self._world.filesystem.space))
        except (StoragedError, OSError) as error:
            event = ev.Trimmed(0, str(error))
        finally:
            self._trimming = False
        self._post(event)

    def _do_trim(self, reclaim: bool) -> int:
        fs = self._world.filesystem
        if reclaim and self._state.active_job is None:
            try:
                self._engine.reclaim()
            except FilesystemError as error:
                log.info("empty chunks stay: %s", error)  # busy, or no room to work in; trimming still helps
        fs.sync()  # what was deleted since the last commit is not free yet
        return fs.trim(self._engine.lock)

    def _settle_after_job(self) -> None:
        """From the resize thread: the balloon is right again, and known to be, before the job is said to be over."""
        limit = self._state.balloon.limit
        try:
            if limit is not None or self._engine.size():
                held = self._engine.hold(limit, fresh=False)
                now = self._world.clock.monotonic()
                self._tell(ev.BalloonSettled(limit, held.size, now, tight(held.space), held.again, held.warning))
        except (StoragedError, OSError) as error:
            log.info("the balloon comes back later: %s", error)  # the job's end makes the core try again

    # --- plumbing

    def _tell(self, event: ev.Event) -> None:
        """From the resize thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._post, event)

    def _post(self, event: ev.Event) -> None:
        self._queue.put_nowait((event, None))

    def _ask(self, event: ev.Event) -> asyncio.Future[Any]:
        """Post `event`; the future has its answer, or None once it was handled and the core has none."""
        if self._stopped:
            raise StoragedError("storaged is stopping", Kind.UNAVAILABLE)
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((event, waiter))
        return waiter

    def _in(self, thread: str, call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads[thread], call, *arguments)

    def _spawn(self, awaitable: Any) -> None:
        task = asyncio.ensure_future(awaitable)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, StoragedError | OSError):
            self._note(f"background work failed: {error}", warning=True)
        else:
            self._fault("background work", error)

    async def _settle_tasks(self) -> None:
        """Wait until effects and the events they raised are through, or the disk has not answered for too long."""
        clock = self._world.clock
        until = clock.monotonic() + ANSWER_WITHIN_S
        while (self._tasks or not self._queue.empty()) and clock.monotonic() < until:
            if self._tasks:
                await asyncio.wait(set(self._tasks), timeout=1)
            await asyncio.sleep(0)

    def _note_once(self, text: str) -> None:
        """As a warning, unless that is the last thing that was said."""
        if not self._notes or self._notes[-1] != text:
            self._note(text, warning=True)

    def _note(self, text: str, *, warning: bool = False) -> None:
        self._notes.append(text)
        log.log(logging.WARNING if warning else logging.INFO, "%s", text)

    def _publish(self, space: Space | None = None) -> None:
        last = self._snapshot
        if space is None:
            assert last is not None
            space = last.space
        self._snapshot = Snapshot(
            sequence=last.sequence + 1 if last else 1,
            state=self._state,
            space=space,
            bounds=self._bounds,
            notes=tuple(self._notes),
            balloon_target=self._engine.target,
            grant=self._engine.grant,
            unwritten=self._engine.unwritten,
            reach=self._engine.reach(space),
            potential=self._engine.potential(space),
            inflated_total=self._engine.inflated_total,
            deflated_total=self._engine.deflated_total,
            moved_total=self._moved_total,
            faults=self._faults,
            wall=self._world.clock.wall(),
        )
        self._changed.set()
        self._changed = asyncio.Event()
