"""The daemon as its service manager sees it: ready, its state in a line, alive, its settings read again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from storaged.config import Settings, restart_needed
from storaged.core import events as ev
from storaged.core.state import State
from storaged.errors import ConfigError, StoragedError
from storaged.notify import Notifier
from storaged.resize.job import JobState
from storaged.rpc.server import Server
from storaged.runtime import StorageService
from storaged.units import format_size

log = logging.getLogger(__name__)


def status_text(state: State) -> str:
    """One line for people: pressure, balloon, job."""
    told = state.pressure.level.name if state.pressure.known else "no report from the host yet"
    parts = [told, f"balloon {format_size(state.balloon.size)}"]
    if state.balloon.reason:
        parts.append(f"not settled: {state.balloon.reason}")
    job = state.job
    if job is not None and job.active:
        way = "shrink" if job.shrinks else "grow"
        waits = "waits for its device" if job.state is JobState.WAITING else f"{int(job.progress * 100)} %"
        parts.append(f"{way} to {format_size(job.requested)}: {waits}")
    return "; ".join(parts)


class ManagedService:
    """Keeps the service manager informed, and takes new settings while it runs."""

    def __init__(
        self,
        storage: StorageService,
        server: Server,
        notifier: Notifier,
        settings: Settings,
        reread: Callable[[], Settings] | None = None,
    ) -> None:
        self._storage = storage
        self._server = server
        self._notifier = notifier
        self._started_with = self.settings = settings
        self._reread = reread
        storage.observe(self._observe)

    def _observe(self, _event: ev.Event, state: State) -> None:
        self._notifier.status(status_text(state))

    def ready(self) -> None:
        """Serving, for the first time."""
        self._notifier.ready()
        try:
            self._notifier.status(status_text(self._storage.snapshot.state))
        except StoragedError as error:
            self._notifier.status(error.message)

    async def keep_alive(self) -> None:
        """While the engine answers, say so as often as the manager wants to hear it."""
        within = self._notifier.watchdog_s
        while within:
            try:
                await asyncio.wait_for(self._storage.alive(), within / 2)
            except TimeoutError:
                log.warning("the engine does not answer; the service manager will hear nothing until it does")
            else:
                self._notifier.alive()
                await asyncio.sleep(within / 3)

    def reload(self) -> None:
        """Read the settings again: what can change is in force at once, a broken file changes nothing."""
        if self._reread is None:
            log.info("there is no configuration file to read again")
            return
        self._notifier.reloading()
        try:
            new = self._reread()
        except ConfigError as error:
            log.warning("the settings stay as they were: %s", error.message)
        else:
            self.settings = new
            self._storage.reconfigure(new.storage)
            self._server.reconfigure(new.limits, new.vsock)
            logging.getLogger().setLevel(new.serve.log_level.upper())
            late = restart_needed(self._started_with, new)
            log.info("settings read again%s", f"; only a restart brings {', '.join(late)}" if late else "")
        finally:
            self._notifier.ready()
