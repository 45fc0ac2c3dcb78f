"""A storage engine that begins when its filesystem is mounted, for a daemon that serves before that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

from storaged.core.model import Config
from storaged.core.ports import World
from storaged.errors import Kind, StoragedError
from storaged.runtime import Observer, StorageService

log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.5


class LateStorage:
    """Stands where a StorageService is expected. Until it has one, every call says that the filesystem is not there.

    `make` finds the filesystem and raises StoragedError as long as it cannot; `begun` is called once it is in use.
    """

    def __init__(
        self,
        make: Callable[[], World],
        where: str,
        config: Config,
        begun: Callable[[StorageService], Awaitable[None]],
    ) -> None:
        self._make = make
        self._where = where
        self._config = config
        self._begun = begun
        self._service: StorageService | None = None
        self._observers: list[Observer] = []
        self._one = asyncio.Lock()
        self._closed = False
        self._halted = ""

    def as_storage(self) -> StorageService:
        """Itself, as what it stands for."""
        return cast("StorageService", self)

    def __getattr__(self, name: str) -> Any:
        if self._service is None:
            raise StoragedError(
                f"no btrfs is mounted at {self._where} yet: StartTermina comes first", Kind.PRECONDITION
            )
        return getattr(self._service, name)

    async def look(self) -> bool:
        """Begin if the filesystem is there; true once it is in use."""
        async with self._one:
            if self._service is not None or self._closed:
                return self._service is not None
            try:
                world = await asyncio.to_thread(self._make)
            except StoragedError as error:
                log.debug("not yet: %s", error.message)
                return False
            service = StorageService(world, self._config)
            for observer in self._observers:
                service.observe(observer)
            await service.start()
            if self._halted:
                await service.halt(self._halted)
            self._service = service
            try:
                await self._begun(service)
            except Exception:
                log.exception("the filesystem is in use, but not all that belongs beside it")
            return True

    async def watch_for_it(self) -> None:
        """Look now and then until it is there: others mount, too."""
        log.info("waiting for a btrfs at %s", self._where)
        while not self._closed and not await self.look():  # noqa: ASYNC110  # mount(2) tells nobody
            await asyncio.sleep(LOOK_EVERY_S)

    # --- what also works without ---

    def observe(self, observer: Observer) -> None:
        """As StorageService does, also for what begins later."""
        self._observers.append(observer)
        if self._service is not None:
            self._service.observe(observer)

    async def start(self) -> None:
        """Begin at once if that is possible."""
        await self.look()

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
        """Nothing begins any more."""
        self._closed = True
        if self._service is not None:
            await self._service.close()

    async def stop(self, *, release: bool = False) -> None:
        """As StorageService does."""
        await self.close()
        if self._service is not None:
            await self._service.stop(release=release)
