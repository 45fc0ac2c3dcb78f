"""A run that is worth watching: guests, a host that shares, a load, and a Prometheus that records it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demo.world import free_port
from lab.daemon import Daemon
from lab.prometheus import Prometheus, Target
from storaged.rpc.proto import storaged_v1_pb2
from storaged.units import GIB
from tests.dashboards.grafana import Window
from tests.dashboards.standin import Member, StandIn

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


@contextlib.contextmanager
def stage(directory: Path, members: list[Member], run_s: float = RUN_S) -> Iterator[Live]:
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
            burden(members, start + run_s)
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
        first.daemon.storage.Trim(storaged_v1_pb2.TrimRequest(), timeout=20)
        time.sleep(0.3)


@contextlib.contextmanager
def simulated(directory: Path) -> Iterator[list[Member]]:
    """Three simulated guests. The last is so small that it is always close to ENOSPC."""
    with contextlib.ExitStack() as cleanup:
        members = []
        for name, size in (("a", "4G"), ("b", "4G"), ("c.d", "300M")):
            home = directory / name
            home.mkdir()
            metrics = f"127.0.0.1:{free_port()}"
            daemon = cleanup.enter_context(Daemon(home, "--sim-size", size, "--metrics", metrics))
            members.append(Member(name, daemon, metrics, lambda: GIB))
        yield members
