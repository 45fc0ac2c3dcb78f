"""One pool's controller: looks, steps the sharing core, tells guests. One event loop owns the state.

A look runs in the pool's own thread, a call to a guest in its own task with a deadline: neither a disk nor a guest
that hangs holds up anybody. Besides whole looks there are glances, one statvfs: they find a crossing early.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from storaged.errors import Kind, StoragedError
from storaged.host import events as ev
from storaged.host import leases, members
from storaged.host.condition import Conditions
from storaged.host.config import GuestConfig, PoolConfig
from storaged.host.guest_work import Agent
from storaged.host.images import ImageBackend, make_backend
from storaged.host.levels import zone
from storaged.host.members import Connect, Members
from storaged.host.model import State, books
from storaged.host.remembered import Remembered
from storaged.host.resizes import Resizes, World
from storaged.host.saga_model import Saga
from storaged.host.settings import Resizing, Sharing
from storaged.host.shares import next_wakeup, step
from storaged.host.watch import PoolError, Watcher
from storaged.units import format_size

log = logging.getLogger(__name__)

GLANCE_S = 0.02
"""A glance costs some microseconds. It has a thread of its own, which wakes the loop only when there is news."""
GATHER_S = 0.005
"""Answers are waited for this long, so that many of them are one step."""
MACHINES_S = 0.5
"""Seconds between two looks at whose machine runs: an end is noticed within a second."""
WAKE_S = 0.05
"""When the next thing is due is looked up this often at most: it takes a walk over all guests."""

Observer = Callable[[State], None]


class Controller:
    """Shares one pool among its guests, from `run` until that is cancelled."""

    def __init__(
        self,
        pool: PoolConfig,
        guests: Sequence[GuestConfig],
        sharing: Sharing,
        watcher: Watcher,
        connect: Connect,
        resizing: Resizing | None = None,
        remembered: Remembered | None = None,
    ) -> None:
        self.pool = pool
        self.state = State(sharing)
        self._watcher = watcher
        self._events: deque[ev.Event] = deque()
        self._news = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self._observers: list[Observer] = []
        self._poll_at = self._wake_at = self._machines_at = self._rest_until = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"pool-{pool.name}")
        self.unread = ""
        """Why the pool cannot be read, or is not to be used; empty when it can."""
        self.conditions = Conditions(pool.path)
        world = World(self._image, self._agent, self._sized, self._changed, self._room, self._claim, self._short)
        self._resizes = Resizes(pool.name, resizing or Resizing(), world)
        self._remembered = remembered
        self._earlier: Mapping[str, int] = {} if remembered is None else remembered.load()
        """By guest: up to which size the process before this one may have let its image grow."""
        around = members.World(
            self.tell,
            self._changed,
            self._resizes.size_of,
            lambda: self.state.pool.pressure.level,
            lambda name: self._earlier.get(name, 0),
        )
        self._members = Members(pool.name, guests, connect, around)
        self.members = self._members.by_name

    def observe(self, observer: Observer) -> None:
        """Have `observer` called after every change that others may want to see."""
        self._observers.append(observer)

    def tell(self, event: ev.Event) -> None:
        """Something has happened; from the event loop's thread."""
        self._events.append(event)
        if not isinstance(event, ev.GrantAcked):
            self._news.set()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(GATHER_S, self._gathered)

    def _gathered(self) -> None:
        self._gathering = None
        self._news.set()

    def check(self) -> None:
        """Raises StoragedError when the pool, or the journal of its resizes, cannot be read at all."""
        self._watcher.glance()
        self._resizes.load()
        total, least = self._watcher.total(), self.state.settings.reserve_least
        if least >= total:
            log.warning(
                "pool %s has %s, and sharing.reserve_least is %s: nothing is ever granted",
                self.pool.name, format_size(total), format_size(least),
            )  # fmt: skip

    def add(self, guest: GuestConfig) -> None:
        """Another guest; its machine is looked for within a second."""
        self._members.add(guest)

    def ready(self, guest: str) -> None:
        """The guest's agent has just started: whatever held its balloon before may be gone."""
        self._members.ready(guest)

    # --- resizes

    @property
    def resizes(self) -> tuple[Saga, ...]:
        """Running ones, then the last that ended, newest first."""
        return self._resizes.snapshot

    @property
    def ended_resizes(self) -> dict[str, tuple[Saga, float]]:
        """By guest: its resize that ended last in this process, and when, monotonic seconds."""
        return self._resizes.ended

    async def resize(self, name: str, size: int) -> Saga:
        """Begin to bring a guest's image and filesystem to `size`; it survives a crash. Raises StoragedError."""
        return await self._resizes.begin(name, size)

    async def cancel_resize(self, wanted: str, guest: str = "") -> Saga:
        """Ask the resize of this id, or that of the guest, to stop. Raises StoragedError."""
        return await self._resizes.cancel(wanted, guest)

    def _image(self, name: str) -> tuple[str, ImageBackend]:
        member = self.members.get(name)
        if member is None:
            raise StoragedError(f"no guest is called {name!r}", Kind.NOT_FOUND)
        if reason := self.conditions.now.reason(name):
            raise StoragedError(reason, Kind.PRECONDITION)
        config = member.config
        return config.image, make_backend(config.control, config.image, config.disk)

    def _agent(self, name: str) -> Agent | None:
        member = self.members.get(name)
        return member.client if member is not None and member.running else None

    def _sized(self, name: str, size: int) -> None:
        """The most that a guest's image can take is another; counted before anything that is told later."""
        self._step(ev.GuestChanged(name, time.monotonic(), size=size))
        self._news.set()

    def _room(self) -> int:
        """What the pool has beyond its reserve. Raises StoragedError while that is not known."""
        pool = self.state.pool
        if self.unread or pool.at is None:
            raise StoragedError(self.unread or f"pool {self.pool.name} was not looked at yet", Kind.UNAVAILABLE)
        return pool.free - pool.reserve

    def _claim(self, name: str, size: int) -> None:
        """Bytes that a resize of the guest may write besides what it may itself."""
        self._step(ev.ClaimSet(name, size, time.monotonic()))
        self._news.set()

    def _short(self, name: str) -> int:
        """Bytes that the guest's claim lacks, or that are promised and not there, or not known to be; 0 for none."""
        guest, pool, slack = self.state.guests.get(name), self.state.pool, books(self.state).slack
        lacks = guest.claim_lacks if guest is not None else 0
        return max(lacks - slack, 1 if lacks or not pool.whole or self.unread else 0)

    def lift_fence(self, name: str) -> None:
        """Let a guest that exceeded its grant have a share again. Raises StoragedError."""
        guest = self.state.guests.get(name)
        if guest is None:
            raise StoragedError(f"no guest is called {name!r}", Kind.NOT_FOUND)
        if not guest.fenced_until:
            raise StoragedError(f"{name} is not fenced: it kept within its grant", Kind.PRECONDITION)
        self._step(ev.FenceLifted(name, time.monotonic()))
        self._news.set()

    def _changed(self) -> None:
        for observer in self._observers:
            observer(self.state)

    async def run(self) -> None:
        """Until cancelled. Guests keep what they were granted last. Raises StoragedError when it cannot begin."""
        async with asyncio.TaskGroup() as group:
            resizes = group.create_task(self._resizes.run(tuple(self.members)), name=f"resizes {self.pool.name}")
            try:
                await self._share()
            finally:
                resizes.cancel()

    async def _share(self) -> None:
        stop = threading.Event()
        glances = threading.Thread(
            target=self._glances, args=(asyncio.get_running_loop(), stop), name=f"glance-{self.pool.name}", daemon=True
        )
        glances.start()
        looking: asyncio.Task[None] | None = None
        try:
            while True:
                self._news.clear()
                now = time.monotonic()
                if now >= self._machines_at:
                    self._machines_at = now + MACHINES_S
                    self._members.look()
                while self._events:
                    self._step(self._next())
                now = time.monotonic()
                if now >= self._wake_at:
                    self._wake(now)
                until = min(self._machines_at, self._wake_at)
                if looking is None or looking.done():
                    look_at = max(self._poll_at, self._rest_until)
                    if now >= look_at:
                        self._poll_at = look_at = now + self.state.settings.poll_most_s
                        looking = asyncio.create_task(self._look())
                    until = min(until, look_at)
                if self._events:
                    continue
                try:
                    async with asyncio.timeout(max(until - now, 0.001)):
                        await self._news.wait()
                except TimeoutError:
                    pass
        finally:
            stop.set()  # not joined: it may hang with the pool
            if looking is not None:
                looking.cancel()
            await self._members.part()
            self._thread.shutdown(wait=False, cancel_futures=True)
            if self._remembered is not None:
                self._remembered.close()

    # --- the core

    def _next(self) -> ev.Event:
        """The oldest event; answers in a row are one."""
        event = self._events.popleft()
        if not isinstance(event, ev.GrantAcked):
            return event
        acks = [event]
        while self._events and isinstance(ack := self._events[0], ev.GrantAcked):
            acks.append(ack)
            self._events.popleft()
        return ev.GrantsAcked(tuple(acks))

    def _step(self, event: ev.Event) -> None:
        self.state, effects = step(self.state, event)
        unsaved = self._unsaved([effect.guest for effect in effects if isinstance(effect, ev.SetGrant)])
        publish = False
        for effect in effects:
            match effect:
                case ev.SetGrant(guest, _, seq) if guest in unsaved:
                    reason = "what it is granted cannot be written down"
                    self.tell(ev.GrantFailed(guest, seq, reason, time.monotonic(), certain=True))
                case ev.SetGrant():
                    self._members.grant(effect, self.state.settings.answer_s)
                case ev.Poll(interval_s):
                    self._poll_at = min(self._poll_at, time.monotonic() + interval_s)
                case ev.Note():
                    log.log(logging.WARNING if effect.warning else logging.INFO, "%s: %s", self.pool.name, effect.text)
                case ev.Publish():
                    publish = True
        if publish:
            self._changed()

    def _unsaved(self, names: Sequence[str]) -> Collection[str]:
        """Write down how far the guests' images may grow; those of `names` that may grow further than is written."""
        book = self._remembered
        if book is None or not names:
            return ()
        ceilings = {name: leases.highest(self.state.guests[name].lease) for name in names}
        return () if book.note(ceilings) else {name for name, size in ceilings.items() if size > book.of(name)}

    def _remember(self) -> None:
        """As answers and reports have changed it; before a guest has answered, what an earlier process wrote stands."""
        if self._remembered is not None:
            stands = dict.fromkeys(self.members, 0)
            for name, guest in self.state.guests.items():
                if guest.runs:
                    stands[name] = max(
                        leases.highest(guest.lease), 0 if guest.lease.bound else self._earlier.get(name, 0)
                    )
            self._remembered.note(stands)

    def _resized(self, sampled: ev.PoolSampled) -> None:
        """An image may be another size by somebody else's hand; counted before what it takes."""
        for name, logical in sampled.sizes.items():
            guest = self.state.guests.get(name)
            if guest is not None and logical != guest.size:
                size = self._members.size(self.members[name].config, logical, sampled.images[name])
                if size != guest.size:
                    log.info("%s: its image has %s, not %s", name, format_size(size), format_size(guest.size))
                    self._step(ev.GuestChanged(name, time.monotonic(), size=size))

    def _wake(self, now: float) -> None:
        wakes = next_wakeup(self.state)
        if wakes is not None and wakes <= now:
            self._step(ev.Tick(now))
            wakes = next_wakeup(self.state)
        self._wake_at = max(now + WAKE_S, wakes if wakes is not None else now + self.state.settings.answer_s)

    # --- the pool

    async def _look(self) -> None:
        loop, begun = asyncio.get_running_loop(), time.monotonic()
        try:
            sampled = await loop.run_in_executor(self._thread, self._take, self._members.images())
        except PoolError as error:
            # Nothing is known, so nothing is told: guests keep what they have.
            if not self.unread:
                log.warning("%s", error.message)
            self.unread = error.message
            self._poll_at = time.monotonic() + self.state.settings.poll_most_s
            self._news.set()
            return
        if self.unread and not self.conditions.now.pool:
            log.info("pool %s can be read again", self.pool.name)
        self.unread = self.conditions.now.pool
        if sampled is not None:
            self._resized(sampled)
            self._step(sampled)
            self._remember()
        # With very many guests a look takes its time: never more than a fifth of all, unless it is urgent.
        ended = time.monotonic()
        self._rest_until = ended + 4 * (ended - begun)
        self._news.set()

    def _take(self, images: dict[str, str]) -> ev.PoolSampled | None:
        """In the pool's thread: a look. On a pool that is not to be used nothing is free, whatever it says."""
        wrong = self.conditions.look(images)
        if not wrong.pool:
            sampled = self._watcher.take({name: path for name, path in images.items() if name not in wrong.guests})
            if self.conditions.stands():
                return sampled
            wrong = self.conditions.look(images)
        # Without images, so that what is gone is not taken for written by others.
        return ev.PoolSampled(0, time.monotonic(), {}) if images else None

    def _glances(self, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        """A thread: brings the next look forward when free crossed a threshold, or fell by an eighth of the reserve."""
        seen_at: float | None = None
        while not stop.wait(GLANCE_S):
            pool, settings = self.state.pool, self.state.settings
            if pool.at == seen_at or self.conditions.now.pool:
                continue  # no look yet, or it was called for already; or nothing that it says counts
            try:
                free = self._watcher.glance()
            except PoolError:
                continue  # the looks say so
            if zone(free, settings) is not zone(pool.free, settings) or pool.free - free > pool.reserve // 8:
                seen_at = pool.at
                with contextlib.suppress(RuntimeError):  # the loop has just been closed
                    loop.call_soon_threadsafe(self._hurry)

    def _hurry(self) -> None:
        self._poll_at = self._rest_until = 0.0
        self._news.set()
