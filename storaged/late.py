"""The storage engine that begins when its filesystem can be managed, for a daemon that serves in any case."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

from storaged.core.model import Config
from storaged.core.ports import World
from storaged.errors import Kind, NotBtrfs, StoragedError, Unfit
from storaged.runtime import ANSWER_WITHIN_S, Observer, StorageService

log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.5
RETRY_EVERY_S = 2.0
"""After a try that found a btrfs and failed: it opened files and took locks."""
MOST_REASONS = 64
FATAL = {Kind.INVALID, Kind.UNSUPPORTED}
"""Wrong configuration, and what this machine can never do."""


class LateStorage:
    """Stands where a StorageService is expected. Until it has one, every call is answered with the reason why not.

    `make` finds the filesystem and raises StoragedError as long as it cannot; `begun` is called once it is in use,
    except by `start`, whose caller sees that by `in_use`. With `patient`, `start` raises nothing: a filesystem that
    cannot be managed may be replaced by one that can.
    """

    def __init__(
        self,
        make: Callable[[], World],
        where: str,
        config: Config,
        begun: Callable[[StorageService], Awaitable[None]],
        *,
        patient: bool = True,
    ) -> None:
        self._make = make
        self._where = where
        self._config = config
        self._begun = begun
        self._patient = patient
        self._service: StorageService | None = None
        self._observers: list[Observer] = []
        self._one = asyncio.Lock()
        self._closed = False
        self._halted = ""
        self._failure: Exception | None = None
        self._logged: set[str] = set()

    def as_storage(self) -> StorageService:
        """Itself, as what it stands for."""
        return cast("StorageService", self)

    @property
    def in_use(self) -> bool:
        """True once there is an engine."""
        return self._service is not None

    @property
    def reason(self) -> str:
        """Why there is no engine yet."""
        failure = self._failure
        if failure is None or isinstance(failure, NotBtrfs):
            return f"no btrfs is mounted at {self._where} yet: StartTermina comes first"
        return f"{self._where} cannot be managed yet: {_text(failure)}"

    def __getattr__(self, name: str) -> Any:
        if self._service is None:
            raise StoragedError(self.reason, Kind.PRECONDITION)
        return getattr(self._service, name)

    async def look(self) -> bool:
        """Begin if the filesystem is there; true once it is in use."""
        async with self._one:
            if self._service is not None or self._closed:
                return self._service is not None
            if (service := await self._try()) is None:
                return False
            try:
                await self._begun(service)
            except Exception:
                log.exception("the filesystem is in use, but not all that belongs beside it")
            return True

    async def _try(self) -> StorageService | None:
        """One attempt, which leaves nothing open when it fails."""
        world: World | None = None
        service: StorageService | None = None
        try:
            world = await asyncio.to_thread(self._make)
            if self._closed:
                raise StoragedError("storaged is stopping", Kind.UNAVAILABLE)
            service = StorageService(world, self._config)
            for observer in self._observers:
                service.observe(observer)
            await service.start()
        except Exception as error:  # noqa: BLE001  # whatever it is, the daemon serves and tries again
            self._failed(error)
            if service is not None:
                await asyncio.to_thread(service.abandon)
            elif world is not None:
                await asyncio.to_thread(world.close)
            return None
        self._failure = None
        self._logged.clear()
        self._service = service
        if self._halted:
            await service.halt(self._halted)
        return service

    def _failed(self, error: Exception) -> None:
        """Keep the reason, and log it the first time."""
        self._failure = error
        if self._closed:
            return
        text = _text(error)
        if isinstance(error, NotBtrfs):
            log.debug("not yet: %s", text)
        elif text not in self._logged and len(self._logged) < MOST_REASONS:
            self._logged.add(text)
            unexpected = error if not isinstance(error, StoragedError) else None
            log.warning("%s cannot be managed yet, will retry: %s", self._where, text, exc_info=unexpected)

    async def watch_for_it(self) -> None:
        """Look now and then until it is there: others mount, too."""
        if not self.in_use:
            log.info("waiting for a btrfs at %s", self._where)
        while not self._closed and not await self.look():
            found = self._failure is not None and not isinstance(self._failure, NotBtrfs)
            await asyncio.sleep(RETRY_EVERY_S if found else LOOK_EVERY_S)

    # --- what also works without ---

    def observe(self, observer: Observer) -> None:
        """As StorageService does, also for what begins later."""
        self._observers.append(observer)
        if self._service is not None:
            self._service.observe(observer)

    async def start(self) -> None:
        """Begin at once if that is possible. Raises StoragedError when it never will be, unless `patient`."""
        async with self._one:
            if await self._try() is None and not self._patient:
                failure = self._failure
                if isinstance(failure, Unfit) or (isinstance(failure, StoragedError) and failure.kind in FATAL):
                    raise failure

    async def alive(self) -> None:
        """A daemon that waits is well."""
        if self._service is not None:
            await self._service.alive()

    def reconfigure(self, config: Config) -> None:
        """For now, or for later."""
        self._config = config
        if self._service is not None:
            self._service.reconfigure(config)

    async def halt(self, reason: str) -> None:
        """No job starts, now or later."""
        self._halted = reason
        if self._service is not None:
            await self._service.halt(reason)

    def go_on(self) -> None:
        """Jobs may start again."""
        self._halted = ""
        if self._service is not None:
            self._service.go_on()

    async def suspend(self) -> None:
        """Everything durable."""
        if self._service is not None:
            await self._service.suspend()

    async def close(self) -> None:
        """Nothing begins any more; an attempt that is under way ends first, so that it leaves nothing open."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_WITHIN_S), self._one:
                pass
        if self._service is not None:
            await self._service.close()

    async def stop(self, *, release: bool = False) -> None:
        """As StorageService does."""
        await self.close()
        if self._service is not None:
            await self._service.stop(release=release)


def _text(error: Exception) -> str:
    return error.message if isinstance(error, StoragedError) else f"{type(error).__name__}: {error}"
