"""The end of the machine, and its sleep: what runs ends safely, all is durable, the answer goes, then the power."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from storaged.errors import Kind, StoragedError
from storaged.guest.power import Power
from storaged.runtime import StorageService

log = logging.getLogger(__name__)

SYNC_WITHIN_S = 10.0
"""A host gives Shutdown 30 s: 15 for a job to end, this for the disk, and the rest is slack."""
FLUSH_WITHIN_S = 1.0
GOING_DOWN = "the machine shuts down"
GOING_TO_SLEEP = "the machine is about to sleep"
SLEEPS_WITHIN_S = 10.0
"""How long no resize starts after PrepareToSuspend: nothing says that the sleep is over, or that none came."""


class PowerControl:
    """Carries out Shutdown and PrepareToSuspend. `refuse(reason)` shuts the gate to new calls, empty opens it."""

    def __init__(self, storage: StorageService, power: Power, refuse: Callable[[str], None]) -> None:
        self._storage = storage
        self._power = power
        self._refuse = refuse
        self._answered = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._awake: asyncio.TimerHandle | None = None
        self.due = False
        """`power_off` is still to be called, after everything else."""

    async def shut_down(self, when_answered: Callable[[Callable[[object], None]], None]) -> None:
        """Make everything ready to go; the power follows the answer, also when nobody waits for it any more.

        `when_answered` takes what is to be called once the answer is out. Raises StoragedError, with everything as
        it was, when the power could not be turned off.
        """
        await asyncio.to_thread(self._power.check)
        when_answered(lambda _: self._answered.set())
        if self._ending is None:
            log.info("the host asked for the power to be turned off")
            self._ending = asyncio.create_task(self._end(), name="shutdown")
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        self._refuse(GOING_DOWN)
        await self._storage.halt(GOING_DOWN)  # a running resize ends at a committed step
        try:
            await self._durable(SYNC_WITHIN_S)
        except StoragedError as error:
            log.warning("%s; the power goes all the same", error.message)

    async def suspend(self) -> None:
        """A running resize ends at a committed step, no other starts for a while; journal and data are on the disk.

        Raises StoragedError when that could not be made sure of; then resizes may start again at once.
        """
        await self._storage.halt(GOING_TO_SLEEP)
        if self._awake is not None:
            self._awake.cancel()
        self._awake = asyncio.get_running_loop().call_later(SLEEPS_WITHIN_S, self._woken)
        try:
            await self._durable(SYNC_WITHIN_S)
        except StoragedError:
            self._awake.cancel()
            self._woken()
            raise

    def _woken(self) -> None:
        """Resizes may start again, unless the machine goes down altogether."""
        self._awake = None
        if self._ending is None:
            self._storage.go_on()

    async def _durable(self, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self._storage.suspend()
                await asyncio.to_thread(self._power.sync)
        except TimeoutError:
            raise StoragedError(f"the disk did not take everything within {within_s:g} s", Kind.UNAVAILABLE) from None

    async def run(self, flushed: Callable[[float], Awaitable[None]]) -> None:
        """Turn the power off once Shutdown was answered, and return. Serves on when the power stays.

        When turning it off ends every process, the caller must first close everything, and then call `power_off`.
        """
        while True:
            await self._answered.wait()
            if self._ending is not None:
                await self._ending
            await flushed(FLUSH_WITHIN_S)
            if self._power.last:
                self.due = True
                return
            try:
                await asyncio.to_thread(self._power.power_off)
            except StoragedError as error:
                log.warning("the power stays on: %s; serving again", error.message)
            else:
                return
            self._answered.clear()
            self._ending = None
            self._storage.go_on()
            self._refuse("")

    def power_off(self) -> None:
        """The last step of all."""
        self._power.power_off()
