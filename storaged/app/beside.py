"""What stands beside the storage engine once it has its filesystem."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from storaged.app.options import Options
from storaged.app.worlds import warm_up, watch_capacity
from storaged.autogrow import AutoGrow
from storaged.errors import StoragedError
from storaged.rpc.server import Server
from storaged.runtime import StorageService
from storaged.units import format_size

log = logging.getLogger("storaged")


class Beside:
    """What stands beside the engine once it has its filesystem: capacity events, the resize child, metrics."""

    def __init__(self, options: Options) -> None:
        self.server: Server | None = None
        self._options = options
        self._exporter: Any = None
        self._watched: int | None = None

    def export(self, storage: StorageService) -> None:
        """Serve metrics if they were asked for. Raises StoragedError."""
        address = self._options.settings.serve.metrics
        if address and self._exporter is None and self.server is not None:
            from storaged.metrics import exporter  # 8 MB that a daemon without metrics need not carry
            from storaged.metrics.calls import CallsCollector

            self._exporter = exporter.serve(storage, address, CallsCollector(self.server))

    async def begin(self, storage: StorageService) -> None:
        """The filesystem is in use."""
        try:
            self.export(storage)
        except StoragedError as error:
            log.warning("no metrics: %s", error.message)
        AutoGrow(storage)
        if not self._options.sim:
            self._watched = watch_capacity(storage, asyncio.get_running_loop())
        warm_up(storage.world)
        log.info("in use: %s", what_is_served(storage, self._options))

    def unwatch(self) -> None:
        """No capacity events any more."""
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = None

    def end(self) -> None:
        """Everything is over."""
        self.unwatch()
        if self._exporter is not None:
            self._exporter.shutdown()


def what_is_served(storage: StorageService, options: Options) -> str:
    size = format_size(storage.current_size())
    return f"a simulated filesystem of {size}" if options.sim else f"{storage.world.filesystem.mountpoint} ({size})"
