"""Grows the filesystem to its device as soon as that has grown, where the administrator wants it."""

from __future__ import annotations

import asyncio
import logging

from storaged.core import events as ev
from storaged.core.pressure import says_critical
from storaged.core.state import State
from storaged.errors import StoragedError
from storaged.resize.job import Job, JobState
from storaged.runtime import StorageService
from storaged.units import format_size, sector_floor

log = logging.getLogger(__name__)


class AutoGrow:
    """Watches one engine for `storage.auto_grow`.

    Only a device that grows while the daemon watches counts. One that is merely larger than its filesystem may be about
    to be cut: a host shrinks the filesystem first and the image after it.

    What is refused is remembered, and tried again when the host is better off or a job has ended; never in between.
    """

    def __init__(self, storage: StorageService) -> None:
        self._storage = storage
        self._device = storage.snapshot.space.device
        self._seen = _occasion(storage.snapshot.state)
        self._wanted = self._due = False
        self._going: asyncio.Task[None] | None = None
        storage.observe(self._observe)

    def _observe(self, event: ev.Event, state: State) -> None:
        before, self._seen = self._seen, _occasion(state)
        due = before != self._seen
        if isinstance(event, ev.CapacityChanged) and event.device != self._device:
            # A device that was cut is what somebody wanted.
            self._wanted = due = state.config.auto_grow and event.device > self._device
            self._device = event.device
        elif before[1] != self._seen[1] and state.job is not None and _shrank(state.job):
            self._wanted = False  # and the image is about to follow
        if not (due and self._wanted and state.config.auto_grow and state.active_job is None):
            return
        self._due = True
        if self._going is None or self._going.done():
            self._going = asyncio.get_running_loop().create_task(self._grow())

    async def _grow(self) -> None:
        while self._due and self._wanted:
            self._due, device = False, self._device
            try:
                if self._storage.current_size() >= sector_floor(device):
                    self._wanted = False  # somebody else has seen to it
                    return
                started = await self._storage.resize(device)
            except (StoragedError, TimeoutError) as error:
                why = error.message if isinstance(error, StoragedError) else "the disk does not answer"
                log.warning("the device has grown to %s, but not the filesystem yet: %s", format_size(device), why)
                continue
            if started:
                self._wanted = self._device > device
                log.info("the device has grown to %s: so does the filesystem", format_size(device))


def _occasion(state: State) -> tuple[bool, str]:
    """What a refusal may have been for: a host that is critically full, and the job that ended last."""
    job = state.job
    return says_critical(state.report, state.config), job.id if job is not None and not job.active else ""


def _shrank(job: Job) -> bool:
    return job.shrinks and job.state is JobState.DONE
