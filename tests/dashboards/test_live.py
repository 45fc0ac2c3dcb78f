"""A real Prometheus scrapes real daemons under load; every query of every dashboard is asked as Grafana asks it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from dashboards.build import BOARDS
from demo.world import free_port
from lab.daemon import Daemon
from lab.prometheus import Prometheus, Target
from storaged.units import GIB
from tests.dashboards.grafana import Window, faults
from tests.dashboards.lint import complaints
from tests.dashboards.mutations import MUTATIONS, mutants
from tests.dashboards.standin import Member, StandIn
from tests.dashboards.test_lint import load
from tests.metrics.support import tool

RUN_S = 14.0
POOL = 24 * GIB


@dataclass(frozen=True, slots=True)
class Live:
    """What was recorded."""

    prometheus: Prometheus
    window: Window
    members: list[Member]


def swinging(began: float) -> int:
    """What is left on the host's disk: down from 16 GiB to nearly nothing and up again, every ten seconds."""
    return int(8 * GIB + 7.6 * GIB * math.cos((time.monotonic() - began) * math.tau / 10))


def stage(directory: Path, members: list[Member]) -> Iterator[Live]:
    """Run a host over `members` under load, and let Prometheus watch."""
    began = time.monotonic()
    with StandIn(members, lambda: swinging(began), POOL) as host:
        targets = [
            Target(
                "storaged",
                host.address,
                f"/guest/{one.name}",
                (("host", "h1"), ("vm", one.name), ("instance", one.name)),
            )
            for one in members
        ]
        targets.append(Target("storaged-host", host.address, "/host", (("host", "h1"),)))
        with Prometheus(directory, targets, free_port()) as prometheus:
            start = time.time()
            burden(members, start + RUN_S)
            assert host.errors == []
            assert prometheus.unhealthy() == []
            # The first seconds have no rate yet: nobody's dashboard begins with the first sample ever.
            yield Live(prometheus, Window(start + 5, time.time()), members)


def burden(members: list[Member], until: float) -> None:
    """Resizes, refused ones too, and what a host asks for in between."""
    first = members[0]
    while time.time() < until:
        minimum = first.call("GetResizeBounds", first.daemon.minimum)
        first.call("ResizeFilesystem", partial(first.daemon.resize, max(minimum, 3 * GIB)))
        first.daemon.wait_resized()
        first.call("ResizeFilesystem", partial(first.daemon.resize, 4 * GIB))
        first.daemon.wait_resized()
        first.call("ResizeFilesystem", partial(first.daemon.resize, 1))
        time.sleep(0.3)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Three simulated guests."""
    tool("prometheus")
    directory = tmp_path_factory.mktemp("live")
    with contextlib.ExitStack() as cleanup:
        members = []
        # The last is so small that it is always close to ENOSPC.
        for name, size in (("a", "4G"), ("b", "4G"), ("c.d", "300M")):
            home = directory / name
            home.mkdir()
            metrics = f"127.0.0.1:{free_port()}"
            daemon = cleanup.enter_context(Daemon(home, "--sim-size", size, "--metrics", metrics))
            members.append(Member(name, daemon, metrics, lambda: GIB))
        with contextlib.contextmanager(stage)(directory, members) as recorded:
            yield recorded


def test_alerts_that_are_due_can_say_what_is_the_matter(live: Live) -> None:
    due = live.prometheus.alerts()
    assert "c.d" in {alert["labels"]["vm"] for alert in due}
    said = [text for alert in due for text in alert["annotations"].values()]
    assert [text for text in said if "error expanding" in text or "<no value>" in text] == []


@pytest.mark.parametrize("name", BOARDS)
def test_every_query_has_an_answer_that_makes_sense(name: str, live: Live) -> None:
    assert faults(load(name), live.prometheus, live.window) == []


def test_what_is_shown_is_true(live: Live) -> None:
    board = load("guest")
    panel = next(one for one in board["panels"] if one["title"] == "Filesystem")
    for member in live.members:
        expression = (
            panel["targets"][0]["expr"].replace("$job", ".+").replace("$host", ".+").replace("$vm", member.name)
        )
        shown = live.prometheus.at(expression, live.window.end)
        assert len(shown) == 1, "one guest, and no other"
        if member is not live.members[0]:
            assert float(shown[0]["values"][0][1]) == member.daemon.status().current_size


def test_broken_dashboards_are_caught(live: Live) -> None:
    caught, missed = 0, []
    for title, board in mutants({name: load(name) for name in BOARDS}):
        if complaints(board) or faults(board, live.prometheus, live.window):
            caught += 1
        else:
            missed.append(title)
    print(f"dashboards: {caught} of {caught + len(missed)} mutations caught, of {len(MUTATIONS)} kinds")
    assert missed == []


def test_queries_that_answer_wrongly_are_caught_by_asking_alone(live: Live) -> None:
    caught, missed = 0, []
    for title, board in mutants({name: load(name) for name in BOARDS}, live_only=True):
        if faults(board, live.prometheus, live.window):
            caught += 1
        else:
            missed.append(title)
    print(f"dashboards, by asking Prometheus alone: {caught} of {caught + len(missed)} mutations caught")
    assert missed == []
