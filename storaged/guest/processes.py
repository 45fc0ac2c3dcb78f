"""Programs that a host starts here: what may be asked for, who waits for their end, when one is started again."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from storaged.errors import InvalidRequest, Kind, StoragedError

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

INIT_PATH = b"/usr/bin:/usr/sbin:/bin:/sbin"
_OURS_ALONE = (b"NOTIFY_SOCKET", b"WATCHDOG_", b"LISTEN_PID", b"LISTEN_FDS", b"LISTEN_FDNAMES")
"""What a service manager tells this daemon and nobody else (sd_notify(3), sd_listen_fds(3))."""


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """How programs are started."""

    console: str = field(
        default="/dev/console", metadata={"help": "The device that programs started with a console write to."}
    )
    respawn_starts: int = field(
        default=10, metadata={"help": "Starts of a respawned program within the window after which it stays down."}
    )
    respawn_window_s: float = field(default=30.0, metadata={"help": "Seconds in which those starts are counted."})
    report_within_s: float = field(
        default=1.0, metadata={"help": "Seconds that a start waits for the host to take a failure report."}
    )
    # Fewer than the calls that the server takes at once: waits alone can never use all of them up.
    most_running: int = field(default=384, metadata={"help": "Programs running at once; one more is refused."})
    startup: str = field(
        default="/etc/maitred", metadata={"help": "Folder of the requests that are carried out before serving."}
    )
    startup_wait_s: float = field(
        default=60.0, metadata={"help": "Seconds that the start waits for one program of that folder, if it asks to."}
    )
    adopt_orphans: bool = field(
        default=False,
        metadata={"help": "Become the parent of what started programs leave behind, as process 1 always is."},
    )


@dataclass(frozen=True, slots=True)
class Launch:
    """One program to start. Bytes, because the kernel gets exactly what the host sent."""

    argv: tuple[bytes, ...]
    env: tuple[tuple[bytes, bytes], ...] = ()
    respawn: bool = False
    console: bool = False
    wait: bool = False

    @property
    def name(self) -> str:
        """What people call it."""
        return os.path.basename(self.argv[0]).decode(errors="replace")


def parse_launch(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    respawn: bool = False,
    console: bool = False,
    wait: bool = False,
) -> Launch:
    """The program that was asked for. Raises InvalidRequest."""
    if not argv:
        raise InvalidRequest("argv is empty; the program and its arguments are accepted")
    if respawn and wait:
        raise InvalidRequest("respawn and wait_for_exit are both set: what is always started again has no end")
    for number, word in enumerate(argv):
        if "\0" in word:
            raise InvalidRequest(f"argv[{number}] {word!r} has a NUL byte")
    for name, value in (env or {}).items():
        if not name or "=" in name or "\0" in name:
            raise InvalidRequest(f"env name {name!r}: a name without = and NUL is accepted")
        if "\0" in value:
            raise InvalidRequest(f"env {name} {value!r} has a NUL byte")
    return Launch(
        tuple(word.encode() for word in argv),
        tuple((name.encode(), value.encode()) for name, value in sorted((env or {}).items())),
        respawn,
        console,
        wait,
    )


def base_environment(pid: int, environment: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """What every program inherits from a daemon with this process id and environment."""
    if pid == 1:
        return {b"PATH": INIT_PATH}
    return {name: value for name, value in environment.items() if not name.startswith(_OURS_ALONE)}


def may_start(starts: Sequence[float], now: float, settings: ProcessSettings) -> bool:
    """True unless a respawned program was started so often lately that it must be broken."""
    return sum(now - start < settings.respawn_window_s for start in starts) < settings.respawn_starts


class Status(enum.Enum):
    """What became of a launch; the values are the contract's."""

    EXITED = 1
    SIGNALED = 2
    LAUNCHED = 3
    FAILED = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a launch: an exit status or a signal's number where there is one."""

    status: Status
    code: int = 0

    def __str__(self) -> str:
        if self.status is Status.SIGNALED:
            return f"was ended by signal {self.code}"
        return f"ended with status {self.code}" if self.status is Status.EXITED else self.status.name.lower()


@dataclass(frozen=True, slots=True)
class Child:
    """A program that runs. `ended` gets its outcome once it is gone and reaped; shield it when waiting."""

    pid: int
    ended: asyncio.Future[Outcome]


class Spawner(Protocol):
    """Starts programs and reaps them, waited for or not."""

    async def start(self, launch: Launch) -> Child:
        """Start it. Raises OSError when the kernel does not. Never cancelled."""
        ...

    def close(self) -> None:
        """Let go; what runs keeps running."""
        ...


Report = Callable[[str], Awaitable[None]]
"""Tells the host that the program of this name ended though it should not have."""


class Processes:
    """Everything that was launched. Create and use it on one event loop; `close` last."""

    def __init__(
        self,
        spawner: Spawner,
        settings: ProcessSettings | None = None,
        *,
        report: Report | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or ProcessSettings()
        self._spawner = spawner
        self._report = report
        self._clock = clock
        self._tasks: set[asyncio.Task[Any]] = set()
        self._supervised: dict[str, asyncio.Task[None]] = {}
        self._starting: set[asyncio.Task[Any]] = set()
        self._running = 0
        self._closing = False

    @property
    def running(self) -> int:
        """Programs that were started and have not ended, respawned ones between two starts included."""
        return self._running

    async def launch(self, launch: Launch) -> Outcome:
        """Start it, and wait for its end if asked to.

        A caller that gives up changes nothing: what was begun is begun to its end, and what runs is reaped.
        """
        if self._closing:
            raise StoragedError("the daemon is stopping", Kind.UNAVAILABLE)
        if self._running >= self.settings.most_running:
            raise StoragedError(
                f"{self._running} programs run already, processes.most_running allows no more", Kind.BUSY
            )
        self._running += 1
        child = await self._whole(self._begin(launch))
        if child is None:
            return Outcome(Status.FAILED)
        if not launch.wait:
            return Outcome(Status.LAUNCHED)
        return await asyncio.shield(child.ended)

    async def ensure(self, name: str, launch: Launch) -> Outcome:
        """Start a respawned program unless the one of this name is looked after already."""
        task = self._supervised.get(name)
        if task is not None and not task.done():
            return Outcome(Status.LAUNCHED)
        self._running += 1
        child = await self._whole(self._begin(launch, name))
        return Outcome(Status.FAILED if child is None else Status.LAUNCHED)

    async def close(self) -> None:
        """Start nothing more, not even again; what runs keeps running."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._starting, return_exceptions=True)
        self._spawner.close()

    async def _whole(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Do `work` to its end even if the caller is cancelled."""
        task = asyncio.create_task(work)
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
        return await asyncio.shield(task)

    async def _begin(self, launch: Launch, name: str | None = None) -> Child | None:
        child = await self._start(launch)
        if child is None:
            self._running -= 1
        elif launch.respawn and not self._closing:
            task = asyncio.create_task(self._supervise(launch, child), name=f"respawn {launch.name}")
            self._tasks.add(task)
            task.add_done_callback(self._let_go)
            if name is not None:
                self._supervised[name] = task
        else:
            child.ended.add_done_callback(self._count_down)
        return child

    async def _start(self, launch: Launch) -> Child | None:
        try:
            child = await self._spawner.start(launch)
        except OSError as error:
            log.warning("%s could not be started: %s", launch.name, error.strerror or error)
            return None
        log.info("%s runs as process %d", launch.name, child.pid)
        return child

    def _let_go(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._running -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("looking after a program failed", exc_info=error)

    def _count_down(self, _: asyncio.Future[Outcome]) -> None:
        self._running -= 1

    async def _supervise(self, launch: Launch, first: Child) -> None:
        child: Child | None = first
        starts = [self._clock()]
        while True:
            if child is not None:
                outcome = await asyncio.shield(child.ended)
                log.warning("%s (process %d) %s", launch.name, child.pid, outcome)
            await self._tell(launch.name)
            now = self._clock()
            if not may_start(starts, now, self.settings):
                log.error("%s stays down: %d starts in %g s", launch.name, len(starts), self.settings.respawn_window_s)
                return
            starts = [*starts, now][-self.settings.respawn_starts :]
            # Not to be cancelled half way: a program that nobody knows would never be reaped.
            child = await self._whole(self._start(launch))

    async def _tell(self, name: str) -> None:
        if self._report is None:
            return
        try:
            await asyncio.wait_for(self._report(name), self.settings.report_within_s)
        except (StoragedError, OSError) as error:  # TimeoutError is one of the latter
            log.warning("the host was not told that %s ended: %s", name, str(error) or "no answer")
