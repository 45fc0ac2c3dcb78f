"""A real engine and server in a thread, on a simulated disk whose shrinks have something to move, slowly."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Self

from storaged.addresses import UnixAddress
from storaged.btrfs.system import SystemClock
from storaged.rpc.server import Server
from storaged.runtime import StorageService
from storaged.sim import SimDisk, make_world
from storaged.units import GIB, MIB

STARTS_WITHIN_S = 20.0


class SlowDaemon:
    """8 GiB with 2 GiB in use at its top, and room for them below; use it in `with`."""

    def __init__(self, directory: Path, speed: float = 1000 * MIB) -> None:
        self.address = f"unix:{directory / 'slow.sock'}"
        self.disk = SimDisk(8 * GIB)
        self.disk.write(6 * GIB)
        data = self.disk.of("data")
        for chunk in data[:-3]:  # the files that were written first are deleted again
            chunk.used = 0
        self.disk.speed = speed
        self._path = str(directory / "slow.sock")
        self._started, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="slow daemon")

    async def _serve(self) -> None:
        storage = StorageService(replace(make_world(self.disk, clock=SystemClock()), poll_s=0.1))
        await storage.start()
        server = Server(storage)
        await server.start([UnixAddress(self._path)])
        self._started.set()
        await asyncio.to_thread(self._stop.wait)
        await server.stop(0)
        await storage.stop()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(STARTS_WITHIN_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
