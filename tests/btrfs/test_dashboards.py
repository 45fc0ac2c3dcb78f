"""On real filesystems and with the host's own daemon every query of every dashboard has an answer that makes sense."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from dashboards.build import BOARDS
from lab.loop import fill
from storaged.units import MIB
from tests.btrfs.support import held, sync
from tests.dashboards.grafana import faults
from tests.dashboards.live import Live, real, stage
from tests.dashboards.test_lint import load
from tests.metrics.support import get, samples, tool

SETTLES_WITHIN_S = 20.0
pytestmark = [pytest.mark.btrfs, pytest.mark.xdist_group("dashboards")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Two guests, written to and resized."""
    tool("prometheus")
    with real() as scene, stage(tmp_path_factory.mktemp("live"), scene) as recorded:
        yield recorded


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_on_a_real_filesystem(name: str, live: Live) -> None:
    assert faults(load(name), live.prometheus, live.window) == []


@pytest.mark.parametrize("name", BOARDS)
def test_no_panel_is_empty_while_nothing_happens(name: str, live: Live) -> None:
    assert faults(load(name), live.prometheus, live.idle, idle=True) == []


def test_a_guest_has_no_more_than_a_hundred_series(live: Live) -> None:
    own = 'count by (vm) ({job="storaged", __name__=~"(storaged|grpc)_.+"})'
    found = {one["metric"]["vm"]: int(one["values"][0][1]) for one in live.prometheus.at(own, live.window.end)}
    assert set(found) == {member.name for member in live.scene.members}
    assert max(found.values()) <= 100, found


def _differences(live: Live) -> dict[str, float]:
    """By how many bytes the host's metrics are off from what its disk and its guests say.

    All is committed first: what an application has fsynced a report counts as taken at once, statvfs only after the
    next commit, half a minute later (the kernel's `bytes_reserved`).
    """
    for member in live.scene.members:
        assert member.disk is not None
        sync(member.disk)
    found = samples(get(live.metrics)[1])
    stats = os.statvfs(live.scene.pool)
    pool = ("pool", "vms")
    off = {
        "size": found["storaged_host_pool_size_bytes", pool] - stats.f_blocks * stats.f_frsize,
        "free": found["storaged_host_pool_free_bytes", pool] - stats.f_bavail * stats.f_frsize,
    }
    for member in live.scene.members:
        assert member.disk is not None
        for name, true in (
            ("image_allocated", member.image.stat().st_blocks * 512),
            ("guest_balloon", held(member.disk)),
            ("guest_available", member.daemon.available()),
        ):
            off[f"{member.name} {name}"] = found[f"storaged_host_{name}_bytes", ("vm", member.name)] - true
    return off


def test_what_the_host_says_is_what_its_disk_says(live: Live) -> None:
    for member in live.scene.members:
        assert member.disk is not None
        fill(
            member.disk.mountpoint / "last", 64 * MIB
        )  # nobody tells the daemon: the host must hear of it all the same
    until = time.monotonic() + SETTLES_WITHIN_S
    while wrong := {name: off for name, off in _differences(live).items() if abs(off) > 8 * MIB}:
        assert time.monotonic() < until, wrong
        time.sleep(0.2)
    found = samples(get(live.metrics)[1])
    pool = ("pool", "vms")
    free, reserve, promised = (
        found[f"storaged_host_pool_{part}_bytes", pool] for part in ("free", "reserve", "promised")
    )
    assert reserve >= 384 * MIB
    assert 0 < promised <= free - reserve
    assert all(found["storaged_host_guest_up", ("vm", member.name)] == 1 for member in live.scene.members)
