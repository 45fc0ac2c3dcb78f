"""Guests whose agents do not behave: mute, slow, garbage, and one that lies. Their images are plain sparse files."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lab.adversary.figures import Figures
from lab.agent import agent, serve
from storaged.units import GIB, MIB

SIZE = 4 * GIB
SLOW_S = (0.5, 4.0)
NAMES = ("mute", "slow", "garbage", "liar")
BEYOND = 150 * MIB
"""What the liar writes beyond its grant: less than half of the reserve, which bears it until it is seen."""


class Agents:
    """All four, each on a unix socket below `directory`, their images in `pool`. Close them at the end."""

    def __init__(self, directory: Path, pool: Path, figures: Figures, seed: int) -> None:
        self.images = {name: pool / f"{name}.img" for name in NAMES}
        for image in self.images.values():
            with image.open("wb") as file:
                file.truncate(SIZE)
        self._directory = directory
        self._figures = figures
        self._dice = random.Random(seed)
        self._over = threading.Event()
        self._liar, self._slow = agent(), agent()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        for work in (self._serve, self._mute, self._garbage, self._lie):
            thread = threading.Thread(target=self._quietly, args=(work,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def address(self, name: str) -> Path:
        """Where it is told its grants."""
        return self._directory / f"{name}.sock"

    def close(self) -> None:
        """Let all of them end."""
        self._over.set()
        for each in self._sockets:
            each.close()
        for thread in self._threads:
            thread.join(10)

    def _quietly(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            if not self._over.is_set():
                raise

    def _listen(self, name: str) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(self.address(name)))
        listening.listen(64)
        listening.settimeout(0.2)
        self._sockets.append(listening)
        return listening

    def _serve(self) -> None:
        async def main() -> None:
            servers = [await serve(self._liar, self.address("liar")), await serve(self._slow, self.address("slow"))]
            while not self._over.is_set():
                self._slow.hangs = True
                await asyncio.sleep(self._dice.uniform(*SLOW_S))
                self._slow.hangs = False
                await asyncio.sleep(0.05)
            for server in servers:
                await server.stop(0)

        asyncio.run(main())

    def _mute(self) -> None:
        self._listen("mute")
        self._over.wait()

    def _garbage(self) -> None:
        listening = self._listen("garbage")
        while not self._over.is_set():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(0.5)
                try:
                    connection.sendall(self._dice.randbytes(self._dice.randrange(1, 4096)))
                    self._figures.did["answers of garbage"] += 1
                except OSError:
                    pass

    def _lie(self) -> None:
        """Write what was granted and more, in bursts; hand it back, and again."""
        image = self.images["liar"]
        while not self._over.wait(self._dice.uniform(15, 40)):
            if self._liar.allowed is None:
                continue
            ends = min(self._liar.allowed, 64 * MIB) + BEYOND
            with image.open("r+b") as file:
                for _ in range(ends // MIB):
                    file.write(self._dice.randbytes(MIB))
                    if self._over.is_set():
                        break
                    time.sleep(0.005)
                os.fsync(file.fileno())
                self._figures.did["lies"] += 1
                self._over.wait(6)
                file.truncate(0)
                file.truncate(SIZE)
