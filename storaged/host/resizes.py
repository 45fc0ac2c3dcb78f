"""Runs the resizes of one pool's guests: each one a saga, written down at every stage, taken up again at the start."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.host import saga as sagas
from storaged.host import saga_model as sm
from storaged.host.cancelling import meant
from storaged.host.guest_work import Agent, GuestWork
from storaged.host.images import ImageBackend, known
from storaged.host.journal import Journal
from storaged.host.saga_model import Saga
from storaged.host.settings import Resizing
from storaged.host.watch import allocated
from storaged.units import MAX_SIZE, MIB, format_size, sector_floor

log = logging.getLogger(__name__)

LEAST = 16 * MIB
"""No btrfs is smaller than this; a smaller number is a slip."""
MARGIN = 64 * MIB
"""Beside an eighth of what a guest moves: the trees that it writes anew, and what others write meanwhile."""
VERIFY_TRIES, VERIFY_S = 10, 0.2


@dataclass(slots=True)
class Job:
    """One saga as it runs. `interrupt` is set once somebody wants it to stop.

    `ended`: when it ended, monotonic seconds; None while it runs, and for one that another process had run.
    """

    saga: Saga
    interrupt: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    ended: float | None = None


class World:
    """What resizes need of the controller: a guest's image and agent, and to be told sizes.

    `room`: bytes that the pool has beyond its reserve; raises StoragedError while that is not known. `claim`: sets
    bytes aside for what a guest's shrink moves, 0 for none. `short`: bytes that are not there for that yet.
    """

    def __init__(
        self,
        image: Callable[[str], tuple[str, ImageBackend]],
        agent: Callable[[str], Agent | None],
        sized: Callable[[str, int], None],
        changed: Callable[[], None],
        room: Callable[[], int],
        claim: Callable[[str, int], None],
        short: Callable[[str], int],
    ) -> None:
        self.image = image
        self.agent = agent
        self.sized = sized
        self.changed = changed
        self.room = room
        self.claim = claim
        self.short = short


class Resizes:
    """All resizes of one pool. `run` takes up what was written down; everything else works only while it runs."""

    def __init__(self, pool: str, settings: Resizing, world: World) -> None:
        self._settings = settings
        self._world = world
        self._journal = Journal(os.path.join(settings.state_dir, f"resizes-{pool}.json"))
        self._jobs: dict[str, Job] = {}
        self._saving = asyncio.Lock()
        self._beginning: set[str] = set()
        self._loaded = self._ended = False

    @property
    def snapshot(self) -> tuple[Saga, ...]:
        """Running ones, then ended ones, newest first."""
        found = [job.saga for job in self._jobs.values()]
        return tuple(sorted(found, key=lambda saga: (not saga.active, -(saga.ended or saga.started))))

    @property
    def ended(self) -> dict[str, tuple[Saga, float]]:
        """By guest: its resize that ended last in this process, and when, monotonic seconds."""
        ended = [(job.saga, job.ended) for job in self._jobs.values() if job.ended is not None]
        return {saga.guest: (saga, at) for saga, at in sorted(ended, key=lambda each: each[1])}

    def load(self) -> None:
        """Read what was written down. Raises StoragedError: what is not known must not be written over."""
        if not self._loaded:
            self._jobs = {saga.id: Job(saga) for saga in self._journal.load()}
            self._loaded = True

    def size_of(self, guest: str) -> int:
        """What a resize under way may make of the guest's image; 0 when there is none."""
        return max(
            (job.saga.to for job in self._jobs.values() if job.saga.active and job.saga.guest == guest), default=0
        )

    async def run(self, guests: Collection[str] = ()) -> None:
        """Until cancelled; what is under way then is taken up at the next start. Raises StoragedError.

        `guests`: all of the pool's, so that what a killed cut left is undone also where the journal is lost.
        """
        self.load()
        await self._recover(guests)
        for job in self._jobs.values():
            saga = job.saga
            if saga.active:
                log.info("%s: the resize to %s goes on at %s", saga.guest, format_size(saga.to), saga.stage.value)
                if saga.cancelling:
                    job.interrupt.set()
                self._start(job, sagas.step(saga, sm.Resumed()))
        self._world.changed()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._ended = True
            tasks = [job.task for job in self._jobs.values() if job.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            async with self._saving:
                pass  # the last page is written

    async def _recover(self, guests: Collection[str]) -> None:
        """Undo what a process that was killed in a cut left behind."""
        cutting = {job.saga.guest for job in self._jobs.values() if job.saga.active and sagas.cuts(job.saga)}

        async def of(guest: str) -> None:
            try:
                _, backend = self._world.image(guest)
                await backend.recover(cutting=guest in cutting)
            except StoragedError as error:
                # Its machine may have ended; a resize that goes on tries again.
                log.log(logging.WARNING if guest in cutting else logging.DEBUG, "%s: %s", guest, error.message)

        await asyncio.gather(*(of(guest) for guest in {*guests, *(job.saga.guest for job in self._jobs.values())}))

    async def begin(self, guest: str, size: int) -> Saga:
        """Start one; it is written down when this returns. Raises StoragedError with what is wrong."""
        to = sector_floor(size)
        if not LEAST <= to <= MAX_SIZE:
            raise InvalidRequest(f"size {size}: between {LEAST} and {MAX_SIZE} bytes are accepted")
        path, backend = self._world.image(guest)
        running = next((job.saga for job in self._jobs.values() if job.saga.active and job.saga.guest == guest), None)
        if running is not None or guest in self._beginning:
            towards = f" to {format_size(running.to)}" if running is not None else ""
            raise StoragedError(f"a resize of {guest}{towards} is running already", Kind.BUSY)
        self._beginning.add(guest)
        try:
            await backend.check()
            image, filesystem = await asyncio.to_thread(known, path)
            await self._agree(guest, to, filesystem or 0)
            saga = Saga(f"{guest}-{uuid.uuid4().hex[:12]}", guest, to, time.time(), filesystem or 0, image or 0)
            job = self._jobs[saga.id] = Job(saga)
            self._forget()
            # What was begun is finished, whether or not the caller waits: a resize that nobody drives never ends.
            return await asyncio.shield(asyncio.create_task(self._launch(job), name=f"begin {saga.id}"))
        finally:
            self._beginning.discard(guest)

    async def _launch(self, job: Job) -> Saga:
        try:
            await self._save()
        except OSError as error:
            del self._jobs[job.saga.id]
            raise StoragedError(f"journal {self._journal.path}: {error.strerror}") from error
        log.info("%s: a resize to %s begins", job.saga.guest, format_size(job.saga.to))
        self._start(job, sagas.begun(job.saga))
        self._world.changed()
        return job.saga

    async def cancel(self, wanted: str, guest: str = "") -> Saga:
        """Ask the resize of this id and this guest to stop; either may be empty. Raises StoragedError."""
        job = self._jobs[meant(self.snapshot, wanted, guest).id]
        job.saga, effects = sagas.step(job.saga, sm.CancelAsked())
        if sm.Interrupt() in effects:
            log.info("%s: the resize is to be cancelled", job.saga.guest)
            job.interrupt.set()
            try:
                await self._save()
            except OSError as error:
                log.warning("journal %s: %s", self._journal.path, error.strerror)
        self._world.changed()
        return job.saga

    async def _agree(self, guest: str, to: int, filesystem: int) -> None:
        agent = self._world.agent(guest)
        if agent is None:
            raise StoragedError(f"{guest} does not run: its filesystem cannot be resized", Kind.UNAVAILABLE)
        status = await agent.resize_status()
        if status.running:
            raise StoragedError(f"{guest} is resizing its filesystem already, asked by somebody else", Kind.BUSY)
        least = await agent.minimum() if to < filesystem else 0
        if to < least:
            raise StoragedError(
                f"size {to} is below the least that {guest} can have: {least} ({format_size(least)})", Kind.OUT_OF_RANGE
            )
        if to < filesystem:
            await self._carry(guest, filesystem - to, self._world.room())

    async def _carry(self, guest: str, cut: int, room: int) -> None:
        """Raises StoragedError when the pool may not have what a shrink by `cut` takes.

        What the guest moves is new space on the host until it is discarded. How much that is the guest alone knows:
        not more than its image takes, nor than what is cut off.
        """
        moves, needs = await self._moves(guest, cut)
        if needs > room:
            raise StoragedError(
                f"the pool cannot carry it: {guest} may move {moves} bytes ({format_size(moves)}), which the host "
                f"holds twice until they are discarded; that takes {needs} bytes, and the pool has {max(room, 0)} "
                f"({format_size(max(room, 0))}) beyond its reserve",
                Kind.PRECONDITION,
            )

    async def _moves(self, guest: str, cut: int) -> tuple[int, int]:
        """Bytes that a shrink by `cut` moves at most, and what that takes of the pool."""
        path, _ = self._world.image(guest)
        taken = await asyncio.to_thread(allocated, path)
        moves = cut if taken is None else min(taken, cut)
        return moves, moves + moves // 8 + MARGIN

    async def _claimed(self, guest: str, cut: int, work: GuestWork) -> None:
        """Set aside what a shrink by `cut` takes, and wait until no other guest may write it. Raises StoragedError.

        Returns early when the resize is to stop: then nobody is asked to shrink.
        """
        _, needs = await self._moves(guest, cut)
        self._world.claim(guest, needs)
        until = time.monotonic() + self._settings.patience_s
        while (short := self._world.short(guest)) > 0 and not work.stops:
            if time.monotonic() >= until:
                raise StoragedError(
                    f"the pool cannot carry it: what {guest} moves takes {format_size(needs)}, and other guests may "
                    f"still write {format_size(short)} of that",
                    Kind.PRECONDITION,
                )
            await asyncio.sleep(self._settings.poll_s)

    async def _room(self) -> int:
        """As `World.room`, patiently: just after the start nothing is known."""
        until = time.monotonic() + self._settings.patience_s
        while True:
            try:
                return self._world.room()
            except StoragedError:
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(self._settings.poll_s)

    # --- one saga

    def _start(self, job: Job, result: sagas.Result) -> None:
        if self._ended:
            return  # it is written down: the next daemon takes it up
        job.saga, effects = result  # now: a cancel may come before the task begins
        job.task = asyncio.create_task(self._drive(job, effects), name=f"resize {job.saga.id}")

    async def _drive(self, job: Job, effects: tuple[sm.Effect, ...]) -> None:
        while True:
            if not job.saga.active:
                job.saga, job.ended = replace(job.saga, ended=time.time()), time.monotonic()
                self._world.claim(job.saga.guest, 0)
                self._say(job.saga)
            event: sm.Event | None = None
            for effect in effects:
                if isinstance(effect, sm.Save):
                    event = await self._saved(job)
                elif event is None:
                    event = await self._work(job, effect)
            self._world.changed()
            if not job.saga.active or event is None:
                return
            job.saga, effects = sagas.step(job.saga, event)

    async def _saved(self, job: Job) -> sm.Event | None:
        """None once it is on the disk; else nothing that follows may begin."""
        try:
            await self._save()
        except OSError as error:
            log.warning("journal %s: %s", self._journal.path, error.strerror)
            return await self._failed(job, f"it cannot be written down: {error.strerror}")
        self._world.changed()
        return None

    async def _save(self) -> None:
        """Raises OSError. Whoever waits may be cancelled; the writing never is half-way when the next begins."""
        await asyncio.shield(asyncio.create_task(self._write()))

    async def _write(self) -> None:
        async with self._saving:
            await asyncio.to_thread(self._journal.save, [job.saga for job in self._jobs.values()])

    def _forget(self) -> None:
        ended = [saga for saga in self.snapshot if not saga.active]
        for saga in ended[self._settings.keep :]:
            del self._jobs[saga.id]

    def _say(self, saga: Saga) -> None:
        outcome = saga.outcome.value if saga.outcome is not None else "ended"
        level = logging.WARNING if saga.outcome is sm.Outcome.FAILED else logging.INFO
        log.log(level, "%s: resize to %s: %s %s", saga.guest, format_size(saga.to), outcome, saga.reason)

    async def _work(self, job: Job, effect: sm.Effect) -> sm.Event:
        try:
            return await self._does(job, effect)
        except StoragedError as error:
            return await self._failed(job, error.message)
        except Exception as error:  # a saga that never ended would keep its guest from ever being resized
            log.exception("%s: %s", job.saga.guest, effect)
            return await self._failed(job, f"{type(error).__name__}: {error}")

    async def _failed(self, job: Job, reason: str) -> sm.Failed:
        try:
            path, _ = self._world.image(job.saga.guest)
        except StoragedError:
            return sm.Failed(reason)
        image, filesystem = await asyncio.to_thread(known, path)
        return sm.Failed(reason, image, filesystem)

    async def _does(self, job: Job, effect: sm.Effect) -> sm.Event:
        guest = job.saga.guest
        _, backend = self._world.image(guest)
        work = GuestWork(job, self._settings, self._world.agent, self._world.changed)
        match effect:
            case sm.Survey():
                await backend.check()
                filesystem = await backend.filesystem_size()
                least = await work.patient(lambda agent: agent.minimum()) if job.saga.to < filesystem else 0
                if least <= job.saga.to < filesystem:
                    await self._carry(guest, filesystem - job.saga.to, await self._room())
                return sm.Surveyed(await backend.size(), filesystem, least)
            case sm.GrowImage(size):
                self._world.sized(guest, size)  # what it could take is promised before it can
                return sm.ImageIs(await backend.grow(size))
            case sm.CutImage(size):
                cut = await backend.shrink(size)
                self._world.sized(guest, cut)
                return sm.ImageIs(cut)
            case sm.AwaitCapacity(size):
                return await work.capacity(size)
            case sm.ResizeFilesystem(size):
                if (cut := await backend.filesystem_size() - size) > 0:
                    await self._claimed(guest, cut, work)
                return await work.filesystem(size)
            case sm.Verify():
                return await self._verified(job.saga.to, backend)
        raise StoragedError(f"{effect} is no work")

    @staticmethod
    async def _verified(to: int, backend: ImageBackend) -> sm.Verified:
        for left in range(VERIFY_TRIES, 0, -1):
            filesystem = await backend.filesystem_size()
            if filesystem == to or left == 1:
                break
            await asyncio.sleep(VERIFY_S)  # the guest's last commit may be on its way
        return sm.Verified(await backend.size(), await backend.filesystem_size())
