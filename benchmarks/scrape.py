"""How long a scrape takes: at rest, and while a shrink moves data and Prometheus asks all the time."""

from __future__ import annotations

import http.client
import threading
import time
from pathlib import Path

from benchmarks.measure import Goal, Row, milliseconds, say
from benchmarks.resize import CALM_S, holed, lowest, wait_for_child
from demo.world import free_port
from lab.daemon import Daemon
from lab.loop import Guest
from storaged.units import GIB, MIB

SECTION = "scrape"
GOAL = Goal(5.0)
DISK = 8 * GIB


def scrape(connection: http.client.HTTPConnection) -> bytes:
    """What Prometheus does: one request, the whole answer."""
    connection.request("GET", "/metrics")
    answer = connection.getresponse().read()
    connection.close()
    return answer


def p99(row: Row, name: str) -> Row:
    """A row for the slowest hundredth of `row`'s samples: for people, it says as much of the machine as of us."""
    worst = sorted(row.ours)[int(len(row.ours) * 0.99)]
    return Row(SECTION, name, "ms", ours=[worst])


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    rest = Row(SECTION, "at rest", "ms", goal=GOAL)
    moving = Row(SECTION, "while a shrink moves data", "ms", goal=GOAL)
    say("scrapes: writing the layout")
    guest = Guest(directory / "scraped", DISK)
    port = free_port()
    try:
        holed(guest, 10)  # with fewer nothing would have to move
        with Daemon(directory, "--metrics", f"127.0.0.1:{port}", stateful=guest.mountpoint) as daemon:
            wait_for_child(daemon)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            series = scrape(connection)
            for _ in range(100 if quick else 500):
                rest.ours.append(milliseconds(lambda: scrape(connection)))
                time.sleep(0.002)
            target = lowest(daemon, GIB)
            done = threading.Event()

            def ask() -> None:
                other = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                while not done.wait(CALM_S):
                    moving.ours.append(milliseconds(lambda: scrape(other)))

            asking = threading.Thread(target=ask)
            say("scrapes during a shrink")
            daemon.resize(target)
            asking.start()
            try:
                daemon.wait_resized()
            finally:
                done.set()
                asking.join()
            moved = daemon.report().job.moved_bytes
        moving.name += f", {moved / MIB:.0f} MiB"
        rest.facts["bytes"] = len(series)
        moving.facts["moved_bytes"] = moved
        return [rest, p99(rest, "at rest, p99"), moving, p99(moving, "while a shrink moves data, p99")]
    finally:
        guest.close()
