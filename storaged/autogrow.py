"""Grows the filesystem to its device as soon as that has grown, where the administrator wants it."""

from __future__ import annotations

import asyncio
import logging

from storaged.core import events as ev
from storaged.core.machine import State
from storaged.errors import StoragedError
from storaged.runtime import StorageService
from storaged.units import format_size

log = logging.getLogger(__name__)


class AutoGrow:
    """Watches one engine for `storage.auto_grow`.

    Only a device that grows while the daemon watches counts. One that is merely larger than its filesystem may be about
    to be cut: a host shrinks the filesystem first and the image after it.
    """

    def __init__(self, storage: StorageService) -> None:
        self._storage = storage
        self._device = storage.snapshot.space.device
        self._going: asyncio.Task[None] | None = None
        storage.observe(self._observe)

    def _observe(self, event: ev.Event, state: State) -> None:
        if not isinstance(event, ev.CapacityChanged):
            return
        before, self._device = self._device, event.device
        if state.config.auto_grow and event.device > before and state.active_job is None:
            self._going = asyncio.get_running_loop().create_task(self._grow(event.device))

    async def _grow(self, device: int) -> None:
        try:
            started = await self._storage.resize(device)
        except StoragedError as error:
            log.warning("the device has grown to %s, but not the filesystem: %s", format_size(device), error.message)
            return
        if started:
            log.info("the device has grown to %s: so does the filesystem", format_size(device))
