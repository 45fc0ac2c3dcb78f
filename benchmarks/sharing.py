"""One controller and a thousand guests' agents: from the pool crossing a threshold to the last guest answered.

The controller is the real one, with real calls over a thousand sockets; the pool's free bytes are a number that the
benchmark sets, and the images are empty sparse files. All agents live in one
other process, which answers at once (see `thousand`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Goal, Row, percentile, say
from benchmarks.process import memory
from storaged.addresses import UnixAddress
from storaged.host.config import GuestConfig, PoolConfig
from storaged.host.controller import Controller
from storaged.host.guests import GuestClient
from storaged.host.leases import Answer
from storaged.host.levels import Level
from storaged.host.service import tune
from storaged.host.settings import Sharing
from storaged.host.watch import Watcher
from storaged.units import GIB

SECTION = "sharing"
PEER = "the same calls, nothing else"
GUESTS = 1000
GOAL_MS = 250.0
AMPLE, SCARCE = 6 * GUESTS * GIB, 3 * GIB
"""So little that nobody can keep what an idle guest holds: all have to be told."""
SHARING = Sharing(low=512 * GIB, critical=32 * GIB, reserve_most=GIB, dwell_s=0.1)
WINDOW_S = 5.0


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section."""
    here = directory / "sharing"
    here.mkdir()
    crossings = 5 if quick else 40
    say(f"{GUESTS} guests on one controller, {crossings} crossings")
    script = str(Path(__file__).resolve())
    guests = [sys.executable, str(Path(script).with_name("thousand.py")), str(here), str(GUESTS)]
    agents = subprocess.Popen(guests, stdout=subprocess.PIPE)
    try:
        assert agents.stdout is not None
        agents.stdout.readline()
        command = [sys.executable, script, str(here), str(crossings)]
        facts = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600).stdout)
    finally:
        agents.terminate()
        agents.wait()
    return [
        Row(
            SECTION,
            "crossing to last answer, p99",
            "ms",
            PEER,
            Goal(GOAL_MS),
            [percentile(facts["ms"], 0.99)],
            [percentile(facts["bare_ms"], 0.99)],
        ),
        Row(SECTION, "crossing to last answer, median", "ms", PEER, None, facts["ms"], facts["bare_ms"]),
        Row(SECTION, "crossing to first call", "ms", ours=facts["first_ms"]),
        Row(SECTION, "processor time of a crossing", "ms", PEER, None, facts["wave_cpu_ms"], facts["bare_cpu_ms"]),
        Row(SECTION, "CPU, nothing to do", "%", ours=[facts["idle_percent"]]),
        Row(SECTION, "memory of the controller", "MB", ours=[facts["resident_mb"]]),
    ]


class _Source:
    value = AMPLE

    def free(self) -> int:
        return self.value

    def total(self) -> int:
        return AMPLE


class _Client(GuestClient):
    """Writes down when each call began and ended well."""

    calls: dict[str, tuple[float, float]] = {}  # noqa: RUF012  # the first of each guest
    count = 0
    everyone: list[_Client] = []  # noqa: RUF012  # as above

    def __init__(self, guest: GuestConfig) -> None:
        super().__init__(guest.name, guest.address, trusted=True)
        self.everyone.append(self)

    async def set_available(self, size: int, level: Level, within_s: float) -> tuple[Answer, str]:
        begun = time.perf_counter()
        answer = await super().set_available(size, level, within_s)
        self.calls.setdefault(self.name, (begun, time.perf_counter()))
        _Client.count += 1
        return answer


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def _calm(controller: Controller) -> None:
    """Until every guest holds a grant and no call was made for a while."""
    quiet, seen = time.perf_counter(), -1
    while True:
        if _Client.count != seen or not all(guest.lease.bound for guest in controller.state.guests.values()):
            quiet, seen = time.perf_counter(), _Client.count
        if time.perf_counter() - quiet > 2 * SHARING.poll_most_s and seen:
            return
        await asyncio.sleep(0.05)


async def _bare() -> float:
    """Milliseconds that a thousand calls take that nobody had to think about."""
    begun = time.perf_counter()
    bare = GuestClient.set_available
    await asyncio.gather(*(bare(client, GIB, Level.NORMAL, 5.0) for client in _Client.everyone))
    return 1000 * (time.perf_counter() - begun)


async def _controller(directory: Path, crossings: int) -> None:
    guests = []
    for index in range(GUESTS):
        image = directory / f"{index}.img"
        with image.open("wb") as file:
            file.truncate(100 * GIB)
        guests.append(GuestConfig(f"vm{index}", UnixAddress(f"{directory}/{index}.sock"), str(image), "pool"))
    source = _Source()
    controller = Controller(
        PoolConfig("pool", str(directory)), guests, SHARING, Watcher(source),
        _Client,
    )  # fmt: skip
    task = asyncio.create_task(controller.run())
    facts: dict[str, list[float]] = {key: [] for key in ("ms", "first_ms", "wave_cpu_ms", "bare_ms", "bare_cpu_ms")}
    await _calm(controller)
    began_s = _cpu_s()
    await asyncio.sleep(WINDOW_S)
    idle = 100 * (_cpu_s() - began_s) / WINDOW_S
    for _ in range(crossings):
        _Client.calls.clear()
        source.value = SCARCE
        crossed, busy_s = time.perf_counter(), _cpu_s()
        while len(_Client.calls) < GUESTS:
            assert time.perf_counter() < crossed + 20, f"{len(_Client.calls)} told"
            await asyncio.sleep(0.005)
        facts["wave_cpu_ms"].append(1000 * (_cpu_s() - busy_s))
        wave = list(_Client.calls.values())
        facts["ms"].append(1000 * (max(end for _, end in wave) - crossed))
        facts["first_ms"].append(1000 * (min(start for start, _ in wave) - crossed))
        source.value = AMPLE
        _Client.calls.clear()
        await _calm(controller)
        busy_s = _cpu_s()
        facts["bare_ms"].append(await _bare())
        facts["bare_cpu_ms"].append(1000 * (_cpu_s() - busy_s))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    print(json.dumps({**facts, "idle_percent": idle, "resident_mb": memory(os.getpid()).resident}))


if __name__ == "__main__":
    tune()
    asyncio.run(_controller(Path(sys.argv[1]), int(sys.argv[2])))
