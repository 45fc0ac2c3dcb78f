"""The sizes that guests are promised, and whether one may grow: what `overcommit` decides, asked of the controllers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence

from storaged.errors import StoragedError
from storaged.host.config import PoolConfig
from storaged.host.controller import Controller
from storaged.host.overcommit import Sizes
from storaged.host.watch import FilesystemSource, ThinSource, capacity, logical

LOOK_S = 60.0
"""A pool's size changes only when an administrator changes it."""


def backing(pool: PoolConfig) -> int:
    """Bytes that back the pool: its filesystem, or the dm-thin pool if that is smaller. Raises OSError, PoolError."""
    size = capacity(pool.path)
    return min(size, ThinSource(FilesystemSource(pool.path), pool.thin_pool).total()) if pool.thin_pool else size


class Promises:
    """`logical_of`: an image's length as seen lately, 0 when not known. One event loop uses it."""

    def __init__(self, controllers: Sequence[Controller], logical_of: Callable[[str], int]) -> None:
        self._controllers = controllers
        self._logical_of = logical_of
        self._totals: dict[str, int] = {}
        self._looked: dict[str, float] = {}
        self._beginning: dict[str, int] = {}

    async def look(self) -> None:
        """See how large the pools are, if that was long ago."""
        for controller in self._controllers:
            await self._look(controller.pool)

    async def _look(self, pool: PoolConfig) -> None:
        if pool.name in self._totals and time.monotonic() - self._looked[pool.name] < LOOK_S:
            return
        with contextlib.suppress(OSError, StoragedError):
            self._totals[pool.name] = await asyncio.to_thread(backing, pool)
            self._looked[pool.name] = time.monotonic()

    def sizes(self, controller: Controller) -> Sizes:
        """What the pool's guests are promised: the largest of a disk as it is, as configured, and as it will be."""
        sizes = {}
        growing = {saga.guest: saga.to for saga in controller.resizes if saga.active}
        for name, member in controller.members.items():
            believed = controller.state.guests.get(name)
            sizes[name] = max(
                self._logical_of(member.config.image),
                believed.size if believed is not None else member.config.size,
                growing.get(name, 0),
                self._beginning.get(name, 0),
            )
        pool = controller.pool.name
        return Sizes(pool, self._totals.get(pool, 0), controller.state.settings.overcommit_limit, sizes)

    @contextlib.asynccontextmanager
    async def growth(self, controller: Controller, guest: str, to: int, *, allowed: bool) -> AsyncIterator[None]:
        """While a resize of `guest` begins. Raises StoragedError when it would promise too much, unless `allowed`."""
        now = await asyncio.to_thread(logical, os.fspath(controller.members[guest].config.image))
        if to <= now:
            yield  # a shrink promises less
            return
        if not allowed:
            await self._look(controller.pool)
            self.sizes(controller).agree(guest, to)
        known = guest in self._beginning
        if not known:
            self._beginning[guest] = to  # two at once must not pass by the same room
        try:
            yield
        finally:
            if not known:
                self._beginning.pop(guest, None)
