"""A pool's guests: whether their machines run, the client of each that does, and what goes out to it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from storaged.errors import StoragedError
from storaged.host import events as ev
from storaged.host.config import GuestConfig
from storaged.host.guest_work import Agent
from storaged.host.guests import NotTold
from storaged.host.leases import Answer
from storaged.host.levels import Level
from storaged.host.machines import Machine
from storaged.host.watch import allocated, logical
from storaged.quiet import BoundedLog

log = logging.getLogger(__name__)


class Client(Agent, Protocol):
    """A guest's agent; see `guests.GuestClient`."""

    reported_at: float | None
    plain: bool

    async def set_available(self, size: int, level: Level, within_s: float) -> tuple[Answer, str]: ...
    async def watch(
        self,
        changed: Callable[[], None],
        lost: Callable[[], None],
        asked: Callable[[int], None],
        potential: Callable[[int, int], None],
    ) -> None: ...
    async def close(self) -> None: ...


Connect = Callable[[GuestConfig], Client]
READY_S = 1.0
"""Starts of one guest's agent are looked at this often at most; more of them in that time are one."""


@dataclass(slots=True)
class Member:
    """A guest as the controller holds it. `grant`: the call under way. Others may look, and change nothing.

    `unmet`: why there is no client though the machine runs. `restart`: until then starts of its agent are not looked
    at; `restarts` when there was one.
    """

    config: GuestConfig
    machine: Machine
    client: Client | None = None
    grant: asyncio.Task[None] | None = None
    watch: asyncio.Task[None] | None = None
    running: bool = False
    unmet: str = ""
    restart: asyncio.TimerHandle | None = None
    restarts: bool = False


@dataclass(frozen=True, slots=True)
class World:
    """What the guests need of their pool. `tell`: something happened; `changed`: a guest's report is another.

    `size_of`: bytes that a resize under way brings an image to; `level`: the pool's pressure now; `ceiling_of`: bytes
    that an earlier process may have let an image grow to.
    """

    tell: Callable[[ev.Event], None]
    changed: Callable[[], None]
    size_of: Callable[[str], int]
    level: Callable[[], Level]
    ceiling_of: Callable[[str], int]


class Members:
    """The guests of the pool `pool`, by name. One event loop uses it."""

    def __init__(self, pool: str, guests: Sequence[GuestConfig], connect: Connect, world: World) -> None:
        self.by_name = {guest.name: Member(guest, Machine(guest.pid_file)) for guest in guests}
        self._pool = pool
        self._connect = connect
        self._world = world
        self._starts = BoundedLog(log, logging.INFO, counted="said")
        self._closing: set[asyncio.Task[None]] = set()

    def add(self, guest: GuestConfig) -> None:
        """Another guest; `look` finds its machine."""
        self.by_name.setdefault(guest.name, Member(guest, Machine(guest.pid_file)))

    def images(self) -> dict[str, str]:
        """The image of every guest that runs."""
        return {name: member.config.image for name, member in self.by_name.items() if member.running}

    def look(self) -> None:
        """Whose machine has started, whose has ended, and who can be called at last."""
        for member in self.by_name.values():
            runs = member.machine.runs()
            if runs and not member.running:
                self._joined(member)
            elif not runs and member.running:
                self._left(member)
            elif runs and member.client is None:
                self._meet(member)

    def ready(self, guest: str) -> None:
        """The guest's agent has just started: whatever held its balloon before may be gone."""
        member = self.by_name[guest]
        self._starts.note(guest, "its agent has started", f"{guest} is ready")
        if member.restart is not None:
            member.restarts = True
            return
        member.restart = asyncio.get_running_loop().call_later(READY_S, self._ready_again, member)
        self._restarted(member)

    def _ready_again(self, member: Member) -> None:
        member.restart, restarts, member.restarts = None, member.restarts, False
        if restarts:
            member.restart = asyncio.get_running_loop().call_later(READY_S, self._ready_again, member)
            self._restarted(member)

    def _restarted(self, member: Member) -> None:
        if not member.running:
            member.machine.announced()
            self._joined(member)
            return
        if member.client is None:
            self._meet(member)
        if member.grant is not None:
            member.grant.cancel()
        self._world.tell(ev.GuestRestarted(member.config.name, time.monotonic()))

    def grant(self, grant: ev.SetGrant, within_s: float) -> None:
        """Tell a guest what it may write; what became of it is told."""
        member = self.by_name[grant.guest]
        member.grant = asyncio.create_task(self._grant(member, grant, within_s))

    async def part(self) -> None:
        """End all calls."""
        for member in self.by_name.values():
            _cancel(member)
            if member.restart is not None:
                member.restart.cancel()
            member.machine.close()
            if member.client is not None:
                await member.client.close()

    async def _grant(self, member: Member, grant: ev.SetGrant, within_s: float) -> None:
        client, name, tell = member.client, grant.guest, self._world.tell
        if client is None:
            reason = member.unmet or "its machine has ended"
            tell(ev.GrantFailed(name, grant.seq, reason, time.monotonic(), certain=True))
            return
        try:
            answer, refused = await client.set_available(grant.size, self._world.level(), within_s)
        except NotTold as error:
            tell(ev.GrantFailed(name, grant.seq, error.message, time.monotonic(), certain=error.certain))
        except Exception as error:  # whatever it is: a call that never ended would keep this guest from ever being told
            log.exception("%s: telling %s failed", self._pool, name)
            tell(ev.GrantFailed(name, grant.seq, type(error).__name__, time.monotonic()))
        else:
            tell(ev.GrantAcked(name, grant.seq, answer, time.monotonic(), refused))

    def size(self, config: GuestConfig, logical: int, image: int) -> int:
        """The most that an image of `logical` bytes can take, which takes `image` now."""
        return max(config.size, logical, image, self._world.size_of(config.name))

    def _joins(self, config: GuestConfig, size: int, image: int) -> ev.GuestJoined:
        ceiling = self._world.ceiling_of(config.name)
        return ev.GuestJoined(config.name, size, image, time.monotonic(), config.weight, ceiling=ceiling)

    def _joined(self, member: Member) -> None:
        config = member.config
        image = allocated(config.image)
        if image is None:
            return  # no image: not prepared yet; `look` asks again
        member.running = True
        size = self.size(config, logical(config.image), image)
        log.info("%s: its machine runs (%s)", config.name, member.machine.reason)
        self._world.tell(self._joins(config, size, image))
        self._meet(member)

    def _meet(self, member: Member) -> None:
        """Make the client of a guest that runs. It writes, and so it counts, also when it cannot be called yet."""
        try:
            member.client = self._connect(member.config)
        except (StoragedError, OSError) as error:  # its certificates are being replaced, say: `look` tries again
            unmet = error.message if isinstance(error, StoragedError) else str(error)
            if member.unmet != unmet:
                log.warning("%s cannot be called: %s", member.config.name, unmet)
            member.unmet = unmet
            return
        if member.unmet:
            log.info("%s can be called now", member.config.name)
        member.unmet = ""
        member.watch = asyncio.create_task(self._watch(member, member.client))

    def _left(self, member: Member) -> None:
        """Forget what belongs to a machine that has ended, without waiting for it."""
        log.info("%s: its machine has ended (%s)", member.config.name, member.machine.reason)
        member.running, member.unmet = False, ""
        _cancel(member)
        if member.client is not None:
            closing = asyncio.create_task(member.client.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        member.client = member.grant = member.watch = None
        self._world.tell(ev.GuestLeft(member.config.name, time.monotonic()))

    async def _watch(self, member: Member, client: Client) -> None:
        name, tell = member.config.name, self._world.tell
        await client.watch(
            self._world.changed,
            lambda: tell(ev.GuestSilent(name, time.monotonic())),
            lambda size: tell(ev.RoomAsked(name, size, time.monotonic())),
            lambda potential, sequence: tell(ev.PotentialReported(name, potential, sequence, time.monotonic())),
        )


def _cancel(member: Member) -> None:
    for task in (member.grant, member.watch):
        if task is not None:
            task.cancel()
