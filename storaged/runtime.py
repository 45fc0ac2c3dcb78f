"""The one writer: a task that owns the storage state, steps the core and runs its effects.

Every event comes through one queue. Reads take the last published state and wait for nobody. Effects that block
run in threads: one for the balloon, one for the resize, one for the rest; what they find comes back as events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from storaged.balloon import plea
from storaged.balloon.engine import BalloonEngine
from storaged.balloon.target import calm, comfortable_headroom, tight
from storaged.core import events as ev
from storaged.core import machine
from storaged.core.model import Config, DirtyLimits, HostReport, Space, Told
from storaged.core.ports import World
from storaged.core.record import Remembered, from_record, to_record
from storaged.errors import FilesystemError, Kind, StoragedError
from storaged.resize.bounds import Bounds, compute
from storaged.resize.job import Job
from storaged.resize.runner import ResizeRunner
from storaged.units import sector_floor

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 15.0
"""A host gives 20 s: an answer must go out in time whatever the disk does."""
READ_WITHIN_S = 2.0
WATCH_AGAIN_S = 2.0
MOST_NOTES = 64
_RECLAIM = True
_THREADS = ("balloon", "resize", "cancel", "upkeep", "read", "bounds", "state")
"""What may wait for what: the journal and the limits never wait for a trim, nor a read for either, nor that for
bounds, which wait for a balloon or a shrink at work."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What readers see: the core's state, and the last space that was read."""

    sequence: int
    state: machine.State
    space: Space
    bounds: Bounds | None
    notes: tuple[str, ...]
    balloon_target: int
    inflated_total: int
    deflated_total: int
    moved_total: int
    wall: float


@dataclass(slots=True)
class _Waiting:
    reports: list[asyncio.Future[str]] = field(default_factory=list)
    job_ends: dict[str, asyncio.Future[Job]] = field(default_factory=dict)


Observer = Callable[[ev.Event, machine.State], None]


class StorageService:
    """The storage engine of one filesystem. Create and use it on one event loop; `start` first, `stop` last."""

    def __init__(self, world: World, config: Config | None = None) -> None:
        self._world = world
        self._state = machine.State(config or Config())
        self._engine = BalloonEngine(world.filesystem, world.balloon)
        self._runner = ResizeRunner(world.filesystem, world.resizer, self._engine, world.clock, poll_s=world.poll_s)
        self._queue: asyncio.Queue[tuple[ev.Event, asyncio.Future[Any] | None]] = asyncio.Queue()
        self._waiting = _Waiting()
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in _THREADS}
        self._notes: deque[str] = deque(maxlen=MOST_NOTES)
        self._observers: list[Observer] = []
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._writer: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._holding = False
        self._hold_next: list[int | None] = []
        self._trimming = False
        self._closing = self._stopped = False
        self._halted = ""
        self._moved_total = 0
        self._bounds: Bounds | None = None
        self._bounds_for: Space | None = None
        self._snapshot: Snapshot | None = None

    # --- for the front ----------------------------------------------------------------------------------------

    @property
    def snapshot(self) -> Snapshot:
        """The last published state; costs nothing."""
        assert self._snapshot is not None, "start() comes first"
        return self._snapshot

    @property
    def world(self) -> World:
        """The ports in use."""
        return self._world

    def observe(self, observer: Observer) -> None:
        """Call `observer(event, state)` after every step, on the event loop."""
        self._observers.append(observer)

    async def start(self) -> None:
        """Find out what is true, recover what an earlier daemon left, begin to take events."""
        fs, clock = self._world.filesystem, self._world.clock
        self._loop = asyncio.get_running_loop()
        remembered = await self._in("upkeep", self._remember)
        job = remembered.job
        if job is not None and job.active and (told := await self._in("resize", self._runner.recover, job)):
            self._note(f"after the resize that was running: {told}", warning=True)
        try:
            if told := await self._in("balloon", self._engine.prepare):
                self._note(told)
        except StoragedError as error:
            self._note(f"could not prepare metadata for the balloon: {error.message}", warning=True)
        space = await self._in("read", fs.space)
        self._publish(space)
        if not await self._in("read", fs.discard_supported):
            self._note("this disk cannot discard: freed blocks never go back to the host", warning=True)
        await self._process(
            ev.Recovered(
                size=space.size,
                device=space.device,
                available=space.available,
                balloon=await self._in("balloon", self._engine.size),
                at=clock.monotonic(),
                wall=clock.wall(),
                limit=remembered.limit,
                level=remembered.level,
                report=remembered.report,
                dirty_found=remembered.dirty_found,
                job=remembered.job,
            ),
            None,
        )
        self._writer = asyncio.create_task(self._run(), name="storage writer")

    async def close(self) -> None:
        """Begin to stop: watchers are let go, a running job is cancelled at a committed step."""
        self._closing = True
        self._changed.set()
        await self.halt("storaged was stopped")

    async def halt(self, reason: str) -> None:
        """No job starts from here on, a running one ends at a committed step; `go_on` takes it back."""
        self._halted = reason
        try:
            # Asked in any case: a job that is about to start stands before this in the queue.
            await asyncio.wait_for(self.cancel(reason), ANSWER_WITHIN_S)
        except StoragedError as error:
            if error.kind is not Kind.PRECONDITION:  # none was running
                log.warning("the running job could not be stopped: %s", error)
        except TimeoutError:
            log.warning("the running job could not be stopped within %g s", ANSWER_WITHIN_S)

    def go_on(self) -> None:
        """Jobs may start again."""
        self._halted = ""

    async def stop(self, *, release: bool = False) -> None:
        """Leave everything safe: a running job is cancelled at a committed step, the balloon stays or is released."""
        if self._writer is None:
            return
        await self.close()
        try:
            if release:
                await self.release()
        finally:
            await self._end()

    async def _end(self) -> None:
        """Let everything go, whatever came before."""
        if self._writer is None:
            return
        await self._settle_tasks()
        # The flag too: Python 3.11's wait_for swallows a cancel that meets a result (fixed in 3.12).
        self._stopped = True
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        self._writer = None
        self._world.resizer.close()
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)

    async def report(self, told: Told, free: int) -> str:
        """A host report; empty when applications are held to it, else the reason why not (yet)."""
        clock = self._world.clock
        event = ev.HostReported(HostReport(told, free, clock.monotonic(), clock.wall()))
        try:
            reason: str = await asyncio.wait_for(self._ask(event), ANSWER_WITHIN_S)
        except TimeoutError:
            return f"the disk did not answer within {ANSWER_WITHIN_S:g} s; still trying"
        return reason

    async def resize(self, size: int) -> bool:
        """Start a resize job. False when one is running already; StoragedError when it is refused."""
        facts = await self._facts(size)
        if self._halted:
            raise StoragedError(f"no resize starts now: {self._halted}", Kind.UNAVAILABLE)
        clock = self._world.clock
        event = ev.ResizeRequested(size, uuid.uuid4().hex[:12], facts, clock.monotonic(), clock.wall())
        answer = await self._ask(event)
        if isinstance(answer, ev.RefuseResize):
            raise StoragedError(answer.message, answer.kind)
        return not answer.already

    async def cancel(self, reason: str = "cancelled on request") -> Job:
        """Cancel the running job and wait for its end. StoragedError when none is running."""
        clock = self._world.clock
        ended: asyncio.Future[Job] | None = await self._ask(ev.CancelRequested(clock.monotonic(), clock.wall(), reason))
        if ended is None:
            raise StoragedError("no resize job is running", Kind.PRECONDITION)
        return await asyncio.shield(ended)

    async def trim(self, *, reclaim: bool) -> int:
        """Hand freed blocks back now; bytes as the kernel counts. StoragedError when that cannot be."""
        if not await self._in("read", self._world.filesystem.discard_supported):
            raise StoragedError("this disk cannot discard: freed blocks never go back to the host", Kind.UNSUPPORTED)
        size: int = await self._in("upkeep", self._do_trim, reclaim)
        await self._ask(ev.Trimmed(size))
        return size

    async def release(self) -> None:
        """Give the balloon and the write-back limits back."""
        await asyncio.wait_for(self._ask(ev.ReleaseRequested(self._world.clock.monotonic())), 60)
        await self._settle_tasks()
        if self._state.balloon.reason:
            raise FilesystemError(f"the balloon could not be released: {self._state.balloon.reason}")

    async def suspend(self) -> None:
        """Everything durable before the machine sleeps."""
        await self._ask(ev.SuspendRequested(self._world.clock.monotonic()))
        await self._settle_tasks()

    async def look(self) -> bool:
        """Something was mounted: nothing to this engine, which has its filesystem (see `late`)."""
        return True

    async def alive(self) -> None:
        """Returns once the writer has handled all that came before: it does not when the writer hangs."""
        clock = self._world.clock
        await self._ask(ev.Tick(clock.monotonic(), clock.wall()))

    def reconfigure(self, config: Config) -> None:
        """Decide by `config` from the next event on. Between two steps: the writer never yields within one."""
        self._state = replace(self._state, config=config)
        self._publish()

    def capacity_changed(self) -> None:
        """The device may have another size now."""
        clock = self._world.clock
        device = self._world.filesystem.device_size()
        self._post(ev.CapacityChanged(device, clock.monotonic(), clock.wall()))

    def current_size(self) -> int:
        """Bytes the filesystem has; what the last job asked for when that is what it has, rounded to a sector."""
        job = self._state.job
        if job is not None and job.active:
            return job.current_size
        size: int = self._world.filesystem.size()
        if job is not None and size == sector_floor(job.requested):
            return job.requested
        return size

    async def bounds(self, patience_s: float | None = None) -> Bounds:
        """How small the filesystem can get; while a job runs, as known before it.

        Raises FilesystemError (BUSY) when that is not known and a job that started meanwhile holds the filesystem
        for longer than `patience_s` (READ_WITHIN_S), and TimeoutError when the disk does not answer.
        """
        if self._state.active_job is not None and self._bounds is not None:
            return self._bounds
        reading = self._in("bounds", self._read_bounds)
        bounds: Bounds | None = await asyncio.wait_for(self._unless_a_job_starts(reading), ANSWER_WITHIN_S)
        if bounds is None and self._bounds is not None:
            return self._bounds
        if bounds is None:
            await asyncio.wait([reading], timeout=READ_WITHIN_S if patience_s is None else patience_s)
            if not reading.done():
                raise FilesystemError("a resize has just started; the bounds are known after it", kind=Kind.BUSY)
            bounds = await reading
        self._bounds = bounds
        self._publish()
        return bounds

    async def bounds_lately(self) -> None:
        """Know the bounds; as they were read last when the filesystem's accounting has not moved since."""
        space = await asyncio.wait_for(self._in("read", self._world.filesystem.space), READ_WITHIN_S)
        if self._bounds is None or space != self._bounds_for:
            await self.bounds()
            self._bounds_for = await asyncio.wait_for(self._in("read", self._world.filesystem.space), READ_WITHIN_S)

    async def available(self) -> int:
        """Bytes applications can still write, by statvfs where the kernel's answer can be believed."""
        fs = self._world.filesystem
        answer: int | None = await asyncio.wait_for(self._in("read", fs.statvfs_available), ANSWER_WITHIN_S)
        if answer is not None:
            return answer
        space: Space = await asyncio.wait_for(self._in("read", fs.space), ANSWER_WITHIN_S)
        return space.available

    async def refreshed(self) -> Snapshot:
        """The present state with the space read anew, if the filesystem answers soon."""
        try:
            space = await asyncio.wait_for(self._in("read", self._world.filesystem.space), READ_WITHIN_S)
        except (StoragedError, TimeoutError):
            return self.snapshot
        return replace(self.snapshot, space=space, wall=self._world.clock.wall())

    async def watch(self, interval_s: float) -> AsyncIterator[Snapshot]:
        """The present state, then the state after every change, at most once in `interval_s`.

        What the guest itself writes is no event, so without one the space is read anew now and then. Ends when the
        service begins to stop.
        """
        while not self._closing:
            seen = self.snapshot.sequence
            yield await self.refreshed()
            await asyncio.sleep(interval_s)
            with contextlib.suppress(TimeoutError):
                if self.snapshot.sequence == seen and not self._closing:
                    await asyncio.wait_for(self._changed.wait(), WATCH_AGAIN_S)

    async def pleas(self) -> AsyncIterator[tuple[plea.Seen, int]]:
        """Bytes to ask the host for, with what they were reckoned from, whenever room runs out."""
        seen, clock = plea.Seen(), self._world.clock
        while not self._closing:
            state = self.snapshot.state
            held = state.balloon.size if state.active_job is None else 0
            if not held:
                seen = plea.Seen(asked_at=seen.asked_at)  # what falls while a resize runs is not what anybody writes
            else:
                try:
                    available = await self.available()
                except (StoragedError, TimeoutError):
                    seen = plea.Seen(asked_at=seen.asked_at)  # a disk that does not answer has no rate
                else:
                    seen, size = plea.look(seen, available, held, clock.monotonic())
                    if size:
                        yield seen, size
            await asyncio.sleep(plea.pause(seen, held))

    # --- the writer -------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._stopped:
            event, waiter = await self._next()
            try:
                await self._process(event, waiter)
            except Exception as error:
                # One broken event must not end the daemon; whoever waits is told.
                log.exception("handling %s failed", type(event).__name__)
                if waiter is not None and not waiter.done():
                    waiter.set_exception(StoragedError(f"internal error: {error!r}"))

    async def _next(self) -> tuple[ev.Event, asyncio.Future[Any] | None]:
        """The next event: what waits in the queue, else a Tick or a look at the device when one is due."""
        clock = self._world.clock
        if self._queue.empty():
            wake = machine.next_wakeup(self._state)
            timeout = None if wake is None else max(wake - clock.monotonic(), 0.001)
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
        for effect in effects:
            try:
                await self._perform(effect, waiter)
            except (StoragedError, OSError) as error:
                self._note(f"{type(effect).__name__} failed: {error}", warning=True)
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
            observer(event, self._state)

    def _job_end(self, job_id: str) -> asyncio.Future[Job]:
        """Done when the job has ended. Whoever waits is shielded from others who give up."""
        return self._waiting.job_ends.setdefault(job_id, asyncio.get_running_loop().create_future())

    async def _perform(  # noqa: C901, PLR0912  # one arm an effect: a table with code in it
        self, effect: ev.Effect, waiter: asyncio.Future[Any] | None
    ) -> None:
        world = self._world
        match effect:
            case ev.HoldAvailable(limit):
                self._hold(limit)
            case ev.GuardMetadata(spent):
                self._look_at_metadata(spent)
            case ev.Trim():
                if not self._trimming:
                    self._trimming = True
                    self._spawn(self._trim_in_background())
            case ev.SetDirtyLimits(dirty_bytes):
                found = await self._in("state", world.sysctl.dirty_limits)
                await self._process(ev.DirtyLimitsFound(found), None)
                lowered = DirtyLimits(dirty_bytes, dirty_bytes // 2, 0, 0)
                await self._in("state", world.sysctl.set_dirty_limits, lowered)
            case ev.RestoreDirtyLimits(limits):
                await self._in("state", world.sysctl.set_dirty_limits, limits)
                await self._process(ev.DirtyLimitsRestored(), None)
            case ev.StartResize(job):
                self._spawn(self._in("resize", self._runner.run, job, self._tell, self._settle_after_job))
            case ev.CancelResize(job_id):
                self._spawn(self._in("cancel", self._runner.cancel, job_id))
            case ev.Sync():
                self._spawn(self._in("upkeep", world.filesystem.sync))
            case ev.Save():
                await self._in("state", world.journal.save, to_record(self._state))
            case ev.Note(text, warning):
                self._note(text, warning=warning)
            case ev.AnswerReport(reason):
                for waiting in self._waiting.reports:
                    if not waiting.done():
                        waiting.set_result(reason)
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

    # --- effects that block -----------------------------------------------------------------------------------

    def _hold(self, limit: int | None) -> None:
        """One at a time; of those that wait only the newest counts."""
        if self._holding:
            self._hold_next = [limit]
            return
        self._holding = True
        self._spawn(self._hold_until_done(limit))

    async def _hold_until_done(self, limit: int | None) -> None:
        clock = self._world.clock
        while True:
            event: ev.Event
            try:
                held = await self._in("balloon", self._engine.hold, limit)
                self._publish(held.space)
                event = ev.BalloonSettled(limit, held.size, clock.monotonic(), tight(held.space))
            except Exception as error:  # noqa: BLE001  # whatever it is, the balloon is tried again
                event = ev.BalloonFailed(limit, await self._balloon_size(), str(error), clock.monotonic())
            self._post(event)
            if not self._hold_next:
                self._holding = False
                return
            limit = self._hold_next.pop()

    async def _balloon_size(self) -> int:
        try:
            return int(await self._in("balloon", self._engine.size))
        except (StoragedError, OSError):
            return self._state.balloon.size

    def _look_at_metadata(self, spent: int) -> None:
        """A glance that costs next to nothing; the balloon's thread is asked only when there is something to do."""
        space = self.snapshot.space
        headroom = self._world.filesystem.metadata_headroom()
        if headroom < comfortable_headroom(space) and not space.mixed:
            self._spawn(self._guard(spent))
            return
        now, size = self._world.clock.monotonic(), self._state.balloon.size
        self._post(ev.BalloonGuarded(size, 0, now, tight(space, headroom), calm(space, headroom)))

    async def _guard(self, spent: int) -> None:
        given, tight = 0, False
        try:
            given, tight = await self._in("balloon", self._engine.guard, self._state.config.reserve, spent)
        except Exception as error:  # noqa: BLE001  # whatever it is, metadata is looked at again
            self._note(f"could not look after metadata: {error}", warning=True)
        size = await self._balloon_size()
        self._post(ev.BalloonGuarded(size, given, self._world.clock.monotonic(), tight))

    async def _trim_in_background(self) -> None:
        try:
            if not await self._in("read", self._world.filesystem.discard_supported):
                return  # said once, at the start
            event = ev.Trimmed(await self._in("upkeep", self._do_trim, _RECLAIM))
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
                fs.reclaim_empty_chunks()
            except FilesystemError as error:
                log.info("empty chunks stay: %s", error)  # busy, or no room to work in; trimming still helps
        fs.sync()  # what was deleted since the last commit is not free yet
        return fs.trim()

    def _read_bounds(self) -> Bounds:
        with self._engine.lock:
            self._world.filesystem.sync()  # chunk usage is true only after a commit
            return compute(self._engine.layout(), self._engine.longest())

    async def _facts(self, size: int) -> ev.Facts:
        job = self._state.active_job
        if job is not None or size < self._state.config.minimum_filesystem:
            # Refused or already running either way: do not disturb the disk for it.
            return ev.Facts(self.current_size(), self.snapshot.space.device, 0)
        fs = self._world.filesystem
        space = await asyncio.wait_for(self._in("read", fs.space), ANSWER_WITHIN_S)
        shrinks = sector_floor(size) < space.size
        bounds = Bounds(0, 0, "")
        if shrinks and not space.read_only:
            try:
                bounds = await self.bounds(patience_s=0)
            except FilesystemError as error:
                if error.kind is not Kind.BUSY:
                    raise
                # A job has started meanwhile: this request is answered with that.
        return ev.Facts(
            size=space.size,
            device=space.device,
            minimum=bounds.minimum,
            why=bounds.why,
            read_only=space.read_only,
            exclusive_operation=space.exclusive_operation,
        )

    async def _unless_a_job_starts(self, reading: asyncio.Future[Bounds]) -> Bounds | None:
        """What is read; None as soon as a job runs, which may hold the filesystem until its end."""
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to see it
        while not reading.done() and self._state.active_job is None:
            changed: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait([reading, changed], return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
        return await reading if reading.done() else None

    def _remember(self) -> Remembered:
        record = self._world.journal.load()
        if record is None:
            return Remembered()
        try:
            return from_record(record, self._world.clock.monotonic())
        except ValueError as error:
            self._note(f"the journal cannot be believed ({error}); going by the filesystem alone", warning=True)
            return Remembered()

    # --- plumbing ---------------------------------------------------------------------------------------------

    def _settle_after_job(self) -> None:
        """From the resize thread: the balloon is right again, and known to be, before the job is said to be over."""
        limit = self._state.balloon.limit
        try:
            if limit is not None or self._engine.size():
                held = self._engine.hold(limit)
                now = self._world.clock.monotonic()
                self._tell(ev.BalloonSettled(limit, held.size, now, tight(held.space)))
        except (StoragedError, OSError) as error:
            log.info("the balloon comes back later: %s", error)  # the job's end makes the core try again

    def _tell(self, event: ev.Event) -> None:
        """From the resize thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._post, event)

    def _post(self, event: ev.Event) -> None:
        self._queue.put_nowait((event, None))

    def _ask(self, event: ev.Event) -> asyncio.Future[Any]:
        """Post `event`; the future has its answer, or None once it was handled and the core has none."""
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
        if not task.cancelled() and (error := task.exception()) is not None:
            self._note(f"background work failed: {error}", warning=True)

    async def _settle_tasks(self) -> None:
        """Wait until effects and the events they raised are through, or the disk has not answered for too long."""
        clock = self._world.clock
        until = clock.monotonic() + ANSWER_WITHIN_S
        while (self._tasks or not self._queue.empty()) and clock.monotonic() < until:
            if self._tasks:
                await asyncio.wait(set(self._tasks), timeout=1)
            await asyncio.sleep(0)

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
            inflated_total=self._engine.inflated_total,
            deflated_total=self._engine.deflated_total,
            moved_total=self._moved_total,
            wall=self._world.clock.wall(),
        )
        self._changed.set()
        self._changed = asyncio.Event()
