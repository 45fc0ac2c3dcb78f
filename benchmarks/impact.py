"""What a shrink costs an application that writes 8 KiB and calls fsync(2), all the time: at each setting, and the tool.

The writer runs while the shrink does; its waits count from the shrink's first request to its end. The peer of every
row is `btrfs filesystem resize` to the same size on the same layout.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Self

from benchmarks.measure import Goal, Row, milliseconds, percentile, say
from benchmarks.resize import resized, resized_by_tool, wait_for_child
from lab.daemon import Daemon
from lab.loop import Guest, fill
from storaged.units import GIB, MIB

SECTION = "impact"
PEER = "btrfs filesystem resize"
GOAL = Goal(15.0)
DISK, FILES, FILE = 6 * GIB, 24, 128 * MIB
BLOCK = bytes(8192)
IDLE_S = 5.0
POLL_S = 0.05


class _Writer:
    """An application; its waits in ms."""

    def __init__(self, path: Path) -> None:
        self.waits: list[float] = []
        self._done = threading.Event()
        self._path = path
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            number = 0
            while not self._done.is_set():
                began = time.perf_counter()
                os.pwrite(fd, BLOCK, (number % 512) * len(BLOCK))
                os.fsync(fd)
                self.waits.append((time.perf_counter() - began) * 1e3)
                number += 1
        finally:
            os.close(fd)


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    idle = Row(SECTION, "write + fsync, nothing runs: p99", "ms")
    rows = {
        impact: (
            Row(SECTION, f"write + fsync, shrink at {impact}: p99", "ms", PEER, GOAL if impact == "low" else None),
            Row(SECTION, f"shrink at {impact} beside it", "ms", PEER),
        )
        for impact in ("low", "normal", "high")
    }
    for index in range(1 if quick else 3):
        say(f"a shrink beside an application, run {index + 1}")
        tool = _shrunk(directory, None, idle)
        for impact, (waits, took) in rows.items():
            ours = _shrunk(directory, impact, idle)
            for row, mine, theirs in zip((waits, took), ours, tool, strict=True):
                row.ours.append(mine)
                row.peer.append(theirs)
    return [idle, *(row for pair in rows.values() for row in pair)]


def _shrunk(directory: Path, impact: str | None, idle: Row) -> tuple[float, float]:
    """p99 of the waits during the shrink, and how long it took, in ms; by the tool where there is no `impact`."""
    guest = Guest(Path(tempfile.mkdtemp(dir=directory)), DISK)
    try:
        for number in range(FILES):
            fill(guest.mountpoint / f"file{number}", FILE)
        for number in range(0, FILES, 2):
            (guest.mountpoint / f"file{number}").unlink()
        os.sync()
        config = directory / "storaged.toml"
        config.write_text(f'[storage]\nresize_impact = "{impact or "high"}"\n', encoding="utf-8")
        with Daemon(directory, "--config", str(config), stateful=guest.mountpoint) as daemon:
            wait_for_child(daemon)
            size = daemon.minimum()
            with _Writer(guest.mountpoint / "application") as writer:
                time.sleep(IDLE_S)
                idle.ours.append(percentile(writer.waits, 0.99))
                writer.waits.clear()
                if impact is None:
                    took = milliseconds(partial(resized_by_tool, guest, size))
                else:
                    took = milliseconds(partial(resized, daemon, size, POLL_S))
                waits = list(writer.waits)
        return percentile(waits, 0.99), took
    finally:
        guest.close()
        guest.image.unlink(missing_ok=True)
