"""`storaged-host serve --sim N`: guests that are not there, on a pool that is not there, shared by the real core.

What the guests do (write, delete, resize) is made up and repeatable; who may write how much of it is decided by
`shares.step`, as always. Nothing on the machine is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from storaged import __version__
from storaged.errors import Kind, StoragedError
from storaged.host import events as ev
from storaged.host.cancelling import meant
from storaged.host.leases import Answer
from storaged.host.levels import Level
from storaged.host.model import Presence, State, books, established
from storaged.host.overcommit import Sizes
from storaged.host.settings import Sharing
from storaged.host.shares import step
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.units import GIB, MIB, format_size, sector_floor

TICK_S = 0.25
MOVES_PER_S = 400 * MIB
ASKS_S = 0.6
HISTORY_MOST = 600
WARM = 8
"""Turns without time in which every guest is told its limit: the story begins with a host that runs already."""
LEAST = 256 * MIB
POOL = "vms"
NAMES = ("web", "db", "build", "mail", "desktop", "ci", "cache", "files")
_LEVEL = {Level.NORMAL: pb.LEVEL_NORMAL, Level.LOW: pb.LEVEL_LOW, Level.CRITICAL: pb.LEVEL_CRITICAL}
_STATE = {
    Presence.CONFIGURED: pb.GUEST_CONFIGURED,
    Presence.DISCOVERED: pb.GUEST_DISCOVERED,
    Presence.UP: pb.GUEST_UP,
    Presence.HANGING: pb.GUEST_HANGING,
    Presence.SUSPENDED: pb.GUEST_SUSPENDED,
    Presence.GONE: pb.GUEST_GONE,
}


@dataclass(slots=True)
class _Guest:
    """A made-up guest. `allowed`: what applications may still write, once it has been told."""

    name: str
    size: int
    used: int
    rate: int
    low: int
    high: int
    allowed: int | None = None
    job: pb.Resize | None = None
    moved: int = 0
    to_move: int = 0
    asked_at: float = 0.0
    hangs: bool = False
    silent_since: float = 0.0

    @property
    def minimum(self) -> int:
        return max(sector_floor(int(self.used * 1.1)) + LEAST, LEAST)

    @property
    def guaranteed(self) -> int:
        return max(sector_floor(self.size - (self.size - self.used) // 2), self.minimum)

    @property
    def available(self) -> int:
        left = max(self.size - self.used, 0)
        return left if self.allowed is None else min(left, self.allowed)


@dataclass(frozen=True, slots=True)
class _Job:
    """A resize as a cancel looks at it."""

    resize: pb.Resize
    active: bool

    @property
    def id(self) -> str:
        return self.resize.id

    @property
    def guest(self) -> str:
        return self.resize.guest


def _made_up(count: int, seed: int) -> list[_Guest]:
    chance = random.Random(seed)  # noqa: S311  # a story, not a secret
    guests = []
    for number in range(count):
        name = NAMES[number % len(NAMES)] + (f"-{number // len(NAMES) + 1}" if number >= len(NAMES) else "")
        size = chance.choice((16, 24, 40, 64)) * GIB
        low = int(size * chance.uniform(0.2, 0.4))
        high = low + int(chance.uniform(1, 5) * GIB)
        used = int(chance.uniform(low, high))
        guests.append(_Guest(name, size, used, chance.choice((2, 8, 30, 60)) * MIB, low, high))
    return guests


@dataclass(slots=True)
class SimulatedHost:
    """The made-up host. `turn` moves it; the rest is what `storaged.host.v1` asks."""

    count: int
    seed: int = 1
    clock: Callable[[], float] = time.time
    total: int = 0
    state: State = field(default_factory=lambda: State(Sharing()))
    guests: dict[str, _Guest] = field(default_factory=dict)
    ended: deque[pb.Resize] = field(default_factory=lambda: deque(maxlen=16))
    history: deque[pb.PressurePoint] = field(default_factory=lambda: deque(maxlen=HISTORY_MOST))
    sequence: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _acks: list[ev.SetGrant] = field(default_factory=list)
    _others: int = 2 * GIB
    _begun: float = 0.0
    _jobs: int = 0

    def __post_init__(self) -> None:
        self.guests = {guest.name: guest for guest in _made_up(self.count, self.seed)}
        stored = sum(guest.used for guest in self.guests.values())
        self.total = stored + self._others + 5 * GIB + self.count * GIB
        self._begun = self.clock()
        for guest in self.guests.values():
            self._step(ev.GuestJoined(guest.name, guest.size, guest.used, self._begun))
        for _ in range(WARM):
            self.turn(0.0)

    @property
    def free(self) -> int:
        """What the made-up disk has left."""
        return max(self.total - self._others - sum(guest.used for guest in self.guests.values()), 0)

    async def run(self) -> None:
        """Turn until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.turn(TICK_S)

    def turn(self, over_s: float) -> None:
        """Let `over_s` seconds pass."""
        now = self.clock()
        for guest in self.guests.values():
            if not guest.hangs:
                self._write(guest, over_s)
            if guest.job is not None:
                self._work(guest, guest.job, over_s, now)
        acks, self._acks = self._acks, []
        for ack in acks:
            guest = self.guests[ack.guest]
            if guest.hangs:
                self._step(ev.GrantFailed(guest.name, ack.seq, "it did not answer in time", now))
                continue
            guest.allowed = ack.size
            self._step(ev.GrantAcked(guest.name, ack.seq, Answer(guest.available), now))
        self._step(ev.PoolSampled(self.free, now, {name: guest.used for name, guest in self.guests.items()}))
        self._remember(now)
        self.sequence += 1
        self.changed.set()
        self.changed = asyncio.Event()

    def _step(self, event: ev.Event) -> None:
        self.state, effects = step(self.state, event)
        self._acks += [effect for effect in effects if isinstance(effect, ev.SetGrant)]

    def _write(self, guest: _Guest, over_s: float) -> None:
        if guest.used >= guest.high or (guest.available < MIB and guest.used > guest.low):
            deleted, guest.used = guest.used - guest.low, guest.low  # what it deletes goes back at once
            guest.allowed = None if guest.allowed is None else guest.allowed + deleted
            return
        wrote = min(int(guest.rate * over_s), guest.available)
        if guest.job is not None:
            wrote = 0
        guest.used += wrote
        if guest.allowed is not None:
            guest.allowed -= wrote

    # --- resizes

    def sizes(self) -> Sizes:
        """What is promised in all."""
        known = {guest.name: max(guest.size, guest.job.to_bytes if guest.job else 0) for guest in self.guests.values()}
        return Sizes(POOL, self.total, self.state.settings.overcommit_limit, known)

    def resize(self, name: str, size: int, *, allow_overcommit: bool = False) -> pb.Resize:
        """Begin. Raises StoragedError."""
        guest, size = self._known(name), sector_floor(size)
        if guest.job is not None:
            raise StoragedError(f"{name} is being resized already; cancel that first", Kind.BUSY)
        if guest.hangs:
            raise StoragedError(f"{name} does not answer, so it cannot resize its filesystem", Kind.UNAVAILABLE)
        if size < guest.minimum:
            raise StoragedError(
                f"{name} cannot be smaller than {format_size(guest.minimum)}: it stores {format_size(guest.used)}",
                Kind.OUT_OF_RANGE,
            )
        if size > guest.size and not allow_overcommit:
            self.sizes().agree(name, size)
        self._jobs += 1
        job = pb.Resize(id=f"sim-{self._jobs}", guest=name, from_bytes=guest.size, to_bytes=size)
        job.state, job.stage = pb.RESIZE_RUNNING, pb.STAGE_PREPARING
        job.image_bytes = job.filesystem_bytes = guest.size
        guest.asked_at = self.clock()
        job.started_at.FromNanoseconds(int(guest.asked_at * 1e9))
        guest.job, guest.moved = job, 0
        guest.to_move = max(guest.size - size, 0) // 2
        return job

    def cancel(self, name: str, job_id: str) -> pb.Resize:
        """Ask it to stop. Raises StoragedError."""
        running = [_Job(guest.job, active=True) for guest in self.guests.values() if guest.job is not None]
        job = meant([*running, *(_Job(each, active=False) for each in self.ended)], job_id, name).resize
        job.state = pb.RESIZE_CANCELLING
        return job

    def _known(self, name: str) -> _Guest:
        if name not in self.guests:
            raise NotKnown(f"no guest is called {name!r}")
        return self.guests[name]

    def _work(self, guest: _Guest, job: pb.Resize, over_s: float, now: float) -> None:
        if job.state == pb.RESIZE_CANCELLING:
            if now >= guest.asked_at + 2 * ASKS_S:
                self._end(guest, job, pb.RESIZE_CANCELLED, "what was begun was taken back", now)
            else:
                job.stage = pb.STAGE_RESTORING
            return
        if now < guest.asked_at + ASKS_S:
            return
        if guest.moved < guest.to_move:
            job.stage = pb.STAGE_FILESYSTEM
            guest.moved = min(guest.moved + int(MOVES_PER_S * over_s), guest.to_move)
            job.moved_bytes, job.rate_bytes_per_s = guest.moved, MOVES_PER_S
            job.eta_s = (guest.to_move - guest.moved) / MOVES_PER_S
            job.progress = 0.95 * guest.moved / guest.to_move
        elif job.stage == pb.STAGE_VERIFYING:
            grown = job.to_bytes - job.from_bytes
            guest.size = job.filesystem_bytes = job.image_bytes = job.to_bytes
            self._step(ev.GuestChanged(guest.name, now, size=max(guest.size, guest.used)))
            if guest.allowed is not None and grown < 0:
                guest.allowed = min(guest.allowed, guest.size - guest.used)
            job.progress = 1.0
            self._end(guest, job, pb.RESIZE_DONE, "", now)
        else:
            job.stage = pb.STAGE_VERIFYING

    def _end(self, guest: _Guest, job: pb.Resize, state: pb.ResizeState.ValueType, reason: str, now: float) -> None:
        job.state, job.stage, job.reason = state, pb.STAGE_ENDED, reason
        job.ended_at.FromNanoseconds(int(now * 1e9))
        job.ClearField("eta_s")
        self.ended.appendleft(job)
        guest.job = None

    # --- reports

    def _remember(self, now: float) -> None:
        if self.history and now - self.history[-1].time.ToNanoseconds() / 1e9 < 1:
            return
        found = self.pool()
        point = pb.PressurePoint(
            free_bytes=found.free_bytes,
            reserve_bytes=found.reserve_bytes,
            promised_bytes=found.promised_bytes,
            level=found.level,
        )
        point.time.FromNanoseconds(int(now * 1e9))
        self.history.append(point)

    def pool(self, *, history: bool = False) -> pb.Pool:
        """The pool."""
        counted, state = books(self.state), self.state
        found = pb.Pool(
            name=POOL,
            path=f"/var/lib/{POOL}",
            total_bytes=self.total,
            free_bytes=self.free,
            reserve_bytes=counted.reserve,
            promised_bytes=counted.promised,
            unbound_bytes=counted.unbound,
            promise_holds=established(state),
            fall_bytes_per_s=state.pool.falls,
            level=_LEVEL[state.pool.pressure.level],
            age_s=0.0,
            guest_count=len(self.guests),
            sizes_bytes=self.sizes().promised,
            sizes_limit_bytes=self.sizes().most,
        )
        if state.pool.falls > 0:
            found.exhausted_in_s = self.free / state.pool.falls
        if history:
            found.history.extend(self.history)
        return found

    def guest(self, name: str) -> pb.Guest:
        """A guest."""
        guest, known = self.guests[name], self.state.guests[name]
        found = pb.Guest(
            name=name,
            pool=POOL,
            state=_STATE[known.presence],
            address=f"unix:/run/{POOL}/{name}.sock",
            image=f"/var/lib/{POOL}/{name}.img",
            logical_bytes=guest.size,
            allocated_bytes=guest.used,
            weight=known.weight,
            grant_bytes=known.lease.granted,
            left_bytes=known.left,
            write_bytes_per_s=known.rate,
            resizable=True,
            filesystem_bytes=guest.size,
            balloon_bytes=max(guest.size - guest.used - guest.available, 0),
            available_bytes=guest.available,
            minimum_bytes=guest.minimum,
            guaranteed_bytes=guest.guaranteed,
            report_age_s=0.0,
        )
        if guest.hangs:
            found.resizable = False
            found.not_resizable_reason = "its agent does not answer"
            found.stale_reason = "its agent does not answer"
            found.report_age_s = max(self.clock() - (guest.silent_since or self._begun), 0)
        return found

    def report(self, *, history: bool) -> pb.Report:
        """Everything."""
        report = pb.Report(sequence=self.sequence, version=f"{__version__}, simulated")
        report.time.FromNanoseconds(int(self.clock() * 1e9))
        report.pools.append(self.pool(history=history))
        report.guests.extend(self.guest(name) for name in sorted(self.guests))
        report.resizes.extend(guest.job for guest in self.guests.values() if guest.job is not None)
        report.resizes.extend(self.ended)
        return report

    async def next(self, within_s: float = 5.0) -> None:
        """Wait for news."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.changed.wait()


class NotKnown(StoragedError):
    """There is no guest, pool or resize of that name."""

    kind = Kind.PRECONDITION
