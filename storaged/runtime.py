"""The storage engine of one filesystem, as whoever serves it uses it: requests in, answers out, the state to read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from storaged.balloon import plea
from storaged.core import events as ev
from storaged.core.model import Config, HostReport, Space, Told
from storaged.core.record import Remembered, from_record
from storaged.core.resize import refusal
from storaged.errors import FilesystemError, Kind, StoragedError
from storaged.resize.bounds import Bounds, compute
from storaged.resize.job import Job
from storaged.resize.layout import KERNEL_MINIMUM
from storaged.units import sector_floor
from storaged.writer import ANSWER_WITHIN_S, Observer, Snapshot, Writer

log = logging.getLogger(__name__)

__all__ = ["ANSWER_WITHIN_S", "READ_WITHIN_S", "Observer", "Snapshot", "StorageService"]

READ_WITHIN_S = 2.0
COUNT_PATIENCE_S = 0.2
RETARGET_TRIES = 3
WATCH_AGAIN_S = 2.0


class StorageService(Writer):
    """The storage engine of one filesystem. Create and use it on one event loop; `start` first, `stop` last."""

    async def start(self) -> None:
        """Find out what is true, recover what an earlier daemon left, begin to take events."""
        fs, clock = self._world.filesystem, self._world.clock
        self._loop = asyncio.get_running_loop()
        self._world.preallocated.start()
        for text, warning in self._world.balloon.found:
            self._note(text, warning=warning)
        remembered = await self._in("upkeep", self._remember)
        job = remembered.job
        if job is not None and job.active and (told := await self._in("resize", self._runner.recover, job)):
            self._note(f"after the resize that was running: {told}", warning=True)
        try:
            if told := await self._in("balloon", self._engine.prepare):
                self._note(told)
        except StoragedError as error:
            self._note(f"could not prepare metadata for the balloon: {error.message}", warning=True)
        await self._in("count", self._engine.count, COUNT_PATIENCE_S)  # on most filesystems that is enough
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
                reclaim_found=remembered.reclaim_found,
                job=remembered.job,
            ),
            None,
        )
        self._counting = asyncio.ensure_future(self._count())
        self._counting.add_done_callback(self._finished)
        self._begin()

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
        self._counting.cancel()
        await asyncio.gather(self._counting, return_exceptions=True)
        self._world.preallocated.close()
        self._world.resizer.close()
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def abandon(self) -> None:
        """After a `start` that failed: let go of everything, the world's files included."""
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)
        self._world.close()

    async def report(self, told: Told, free: int) -> str:
        """A host report; empty when applications are held to it, else the reason why not (yet)."""
        clock = self._world.clock
        event = ev.HostReported(HostReport(told, free, clock.monotonic(), clock.wall()))
        try:
            reason: str = await asyncio.wait_for(self._ask(event), ANSWER_WITHIN_S)
        except TimeoutError:
            return f"the disk did not answer within {ANSWER_WITHIN_S:g} s; still trying"
        return reason

    async def resize(self, size: int, *, best_effort: bool = False) -> bool:
        """Start a resize job. False when one is running already; StoragedError when it is refused.

        With `best_effort` a shrink goes below the minimum as far as it can, and ends well wherever that is.
        """
        facts = await self._facts(size)
        if self._halted:
            raise StoragedError(f"no resize starts now: {self._halted}", Kind.UNAVAILABLE)
        clock = self._world.clock
        event = ev.ResizeRequested(size, uuid.uuid4().hex[:12], facts, clock.monotonic(), clock.wall(), best_effort)
        answer = await self._ask(event)
        if isinstance(answer, ev.RefuseResize):
            raise StoragedError(answer.message, answer.kind)
        return not answer.already

    async def retarget(self, size: int, *, best_effort: bool = False) -> Job:
        """As `resize`, after the job that runs was cancelled; the new one. What would be refused cancels nothing."""
        if self._state.active_job is not None:
            await self._refuse(size, best_effort=best_effort)
        # Whoever asked may give up: what was begun is brought to its end all the same.
        return await asyncio.shield(self._cancel_and_start(size, best_effort=best_effort))

    async def _refuse(self, size: int, *, best_effort: bool) -> None:
        """StoragedError if `size` could not be, by what can be known while a job runs."""
        space = await asyncio.wait_for(self._in("read", self._world.filesystem.space), ANSWER_WITHIN_S)
        facts = ev.Facts(self.current_size(), space.device, KERNEL_MINIMUM, read_only=space.read_only)
        refused = refusal(size, facts, self._state, best_effort=best_effort)
        if refused is None and sector_floor(size) < facts.size and not best_effort:
            bounds = await self.bounds()  # as known before the job, or as they are while it waits for its device
            facts = replace(facts, minimum=bounds.minimum, why=bounds.why)
            refused = refusal(size, facts, self._state)
        if refused is not None:
            raise StoragedError(refused.message, refused.kind)

    async def _cancel_and_start(self, size: int, *, best_effort: bool) -> Job:
        async with self._retargeting:
            for _ in range(RETARGET_TRIES):
                with contextlib.suppress(StoragedError):  # none runs, or it has just ended
                    await self.cancel(f"another size was asked for: {size} bytes")
                if await self.resize(size, best_effort=best_effort):  # else somebody was quicker
                    break
            else:
                raise StoragedError("other resizes begin all the time; ask again", Kind.BUSY)
            assert self._state.job is not None
            return self._state.job

    async def started(self, size: int, *, best_effort: bool = False) -> Job:
        """As `resize`; the job. StoragedError (BUSY) when another one is running."""
        if not await self.resize(size, best_effort=best_effort):
            raise StoragedError("a resize job is running; cancel it first, or retarget it", Kind.BUSY)
        assert self._state.job is not None
        return self._state.job

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
        if held := await self._in("read", self._engine.size):
            raise FilesystemError(f"the balloon is not released yet: {held} bytes are held", kind=Kind.BUSY)

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
        with contextlib.suppress(StoragedError):  # a Tick that failed was handled, told and counted all the same
            await self._ask(ev.Tick(clock.monotonic(), clock.wall()))

    def reconfigure(self, config: Config) -> None:
        """Decide by `config` from the next event on. Between two steps: the writer never yields within one."""
        self._state = replace(self._state, config=config)
        self._publish()

    def capacity_changed(self) -> None:
        """The device may have another size now."""
        clock = self._world.clock
        try:
            device = self._world.filesystem.device_size()
        except (StoragedError, OSError) as error:  # it went meanwhile; a job that waits for it polls
            self._note_once(f"looking at the device failed: {error}")
            return
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

    async def bounds_lately(self, patience_s: float) -> None:
        """Know the bounds, if the disk answers within `patience_s`: one that is frozen must not hold up a report."""
        if self._lately is None or self._lately.done():
            self._lately = asyncio.ensure_future(self._refresh_bounds())
            self._lately.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([self._lately], timeout=patience_s)

    async def _refresh_bounds(self) -> None:
        """As they were read last when the filesystem's accounting has not moved since."""
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

    async def measured(self) -> Snapshot | None:
        """The present state with the space just read; None when the filesystem does not answer soon."""
        try:
            space = await asyncio.wait_for(self._in("read", self._world.filesystem.space), READ_WITHIN_S)
        except (StoragedError, TimeoutError):
            return None
        reach, potential = self._engine.reach(space), self._engine.potential(space)
        return replace(self.snapshot, space=space, reach=reach, potential=potential)

    async def refreshed(self) -> Snapshot:
        """The present state with the space read again, if the filesystem answers soon.

        Its sequence is of before it was read: what it says of the space is at least as new as that.
        """
        sequence = self.snapshot.sequence
        try:
            space = await asyncio.wait_for(self._in("read", self._world.filesystem.space), READ_WITHIN_S)
            await asyncio.wait_for(self._in("count", self._engine.count, COUNT_PATIENCE_S), READ_WITHIN_S)
        except (StoragedError, TimeoutError):
            return self.snapshot
        engine = self._engine
        return replace(
            self.snapshot,
            sequence=sequence,
            space=space,
            unwritten=engine.unwritten,
            reach=engine.reach(space),
            potential=engine.potential(space),
            wall=self._world.clock.wall(),
        )

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

    def _read_bounds(self) -> Bounds:
        with self._engine.lock:
            self._world.filesystem.sync()  # chunk usage is true only after a commit
            return compute(self._engine.layout(), self._engine.longest())

    async def _facts(self, size: int) -> ev.Facts:
        job = self._state.active_job
        if job is not None or size < self._state.config.minimum_filesystem:
            # Refused or already running either way: do not disturb the disk for it.
            return ev.Facts(self.current_size(), self.snapshot.space.device, 0, job_ran=job is not None)
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
