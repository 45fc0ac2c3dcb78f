"""On a real btrfs every query of every dashboard has an answer that makes sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashboards.build import BOARDS
from demo.world import free_port
from lab.loop import fill
from storaged.units import GIB, MIB
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.dashboards.grafana import faults
from tests.dashboards.live import stage
from tests.dashboards.standin import Member
from tests.dashboards.test_lint import load
from tests.metrics.support import tool

pytestmark = pytest.mark.btrfs


def test_dashboards_on_a_real_filesystem(make_guest: MakeGuest, make_daemon: MakeDaemon, tmp_path: Path) -> None:
    tool("prometheus")
    members = []
    for name in ("a", "b"):
        guest = make_guest(4 * GIB)
        fill(guest.mountpoint / "data", 300 * MIB)
        metrics = f"127.0.0.1:{free_port()}"
        members.append(Member(name, make_daemon(guest, "--metrics", metrics), metrics, guest.host_bytes))
    with stage(tmp_path, members) as live:
        found = {name: faults(load(name), live.prometheus, live.window) for name in BOARDS}
    assert {name: sentences for name, sentences in found.items() if sentences} == {}
