"""How long a scrape takes: at rest, and while shrinks move data and Prometheus asks all the time.

In turns with a bare HTTP server in a process of its own: what both have in common is the machine's.
"""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Goal, Row, in_turns, milliseconds, percentile, say
from benchmarks.resize import holed, lowest, wait_for_child
from lab.daemon import Daemon
from lab.loop import Guest
from lab.simulated import free_port
from storaged.units import GIB, MIB

SECTION = "scrape"
PEER = "an empty HTTP server"
GOAL = Goal(5.0)
DISK = 8 * GIB
PACE_S = 0.005
EMPTY_HTTP = Path(__file__).with_name("empty_http.py")


def scrape(port: int) -> bytes:
    """What Prometheus does: one request, the whole answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    answer = connection.getresponse().read()
    connection.close()
    return answer


def p99(row: Row, name: str) -> Row:
    """A row for the slowest hundredth of `row`'s samples."""
    return Row(SECTION, name, "ms", PEER, GOAL, ours=[percentile(row.ours, 0.99)], peer=[percentile(row.peer, 0.99)])


@contextlib.contextmanager
def peer(length: int) -> Iterator[int]:
    """The peer's port; it answers as many bytes as we do."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(EMPTY_HTTP), str(port), str(length)])
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                scrape(port)
                break
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    rest = Row(SECTION, "at rest", "ms", PEER, GOAL)
    moving = Row(SECTION, "while shrinks move data", "ms", PEER, GOAL)
    moved = 0
    for run in range(1 if quick else 5):
        say(f"scrapes: writing layout {run + 1}")
        guest = Guest(directory / "scraped", DISK)
        try:
            holed(guest, 10)  # with fewer nothing would have to move
            port = free_port()
            with Daemon(directory, "--metrics", f"127.0.0.1:{port}", stateful=guest.mountpoint) as daemon:
                wait_for_child(daemon)
                with peer(len(scrape(port))) as other:
                    moved += _run(daemon, port, other, rest, moving)
        finally:
            guest.close()
            guest.mountpoint.rmdir()
    moving.facts["moved_bytes"] = moved
    moving.name += f", {moved / MIB:.0f} MiB"
    return [rest, p99(rest, "at rest, p99"), moving, p99(moving, "while shrinks move data, p99")]


def _run(daemon: Daemon, port: int, other: int, rest: Row, moving: Row) -> int:
    """One layout's samples; bytes that the shrink moved."""

    def ask(index: int, row: Row) -> None:
        in_turns(
            index,
            lambda: row.ours.append(milliseconds(lambda: scrape(port))),
            lambda: row.peer.append(milliseconds(lambda: scrape(other))),
        )
        time.sleep(PACE_S)

    for index in range(200):
        ask(index, rest)
    target = lowest(daemon, GIB)
    done = threading.Event()

    def ask_on() -> None:
        index = 0
        while not done.is_set():
            ask(index, moving)
            index += 1

    asking = threading.Thread(target=ask_on)
    daemon.resize(target)
    asking.start()
    try:
        while daemon.status().resize_in_progress:
            time.sleep(0.2)  # hosts poll seldom; how polls and scrapes get on is asked elsewhere
    finally:
        done.set()
        asking.join()
    return daemon.report().job.moved_bytes
