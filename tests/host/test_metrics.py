"""The host's metrics are what the controllers believe, under the names that the dashboards ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dashboards.src.series import HOST
from storaged.addresses import UnixAddress
from storaged.errors import ConfigError
from storaged.host.config import GuestConfig, HostConfig, PoolConfig, parse
from storaged.host.families import LEVELS, REASONS
from storaged.host.metrics import HostCollector
from storaged.host.model import books
from storaged.host.service import Host
from storaged.host.settings import Resizing
from tests.host.test_controller import until
from tests.host.test_saga_service import Bench, running
from tests.metrics.support import promtool, written


def samples(collector: HostCollector) -> dict[Any, float]:
    """By name and labels, as a scraper reads them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(written(collector))
        for sample in family.samples
    }


async def granted(bench: Bench) -> None:
    """Wait until the guest has been told something."""
    guests = bench.host.controllers[0]
    await until(lambda: "a" in guests.state.guests and guests.state.guests["a"].lease.bound)


async def test_they_are_what_the_controllers_believe(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        collector = HostCollector(bench.host.controllers)
        await granted(bench)
        found = samples(collector)
        state = bench.host.controllers[0].state
        pool, vm, guest = (("pool", "p"),), (("vm", "a"),), state.guests["a"]
        assert found["storaged_host_pool_reserve_bytes", pool] == books(state).reserve
        assert 0 < found["storaged_host_pool_free_bytes", pool] <= found["storaged_host_pool_size_bytes", pool]
        assert found["storaged_host_guest_grant_bytes", vm] == guest.lease.granted
        assert found["storaged_host_guest_weight", vm] == 2
        assert found["storaged_host_guest_up", vm] == 1
        assert found["storaged_host_image_allocated_bytes", vm] == guest.image
        levels = [found["storaged_host_pressure", (("pool", "p"), ("state", s))] for s in ("normal", "low", "critical")]
        assert sum(levels) == 1
        assert {labels[0][1] for name, labels in found if name == "storaged_host_rebalances_total"} == set(REASONS)


async def test_every_label_value_is_there_from_the_start(tmp_path: Path) -> None:
    config = HostConfig(
        (PoolConfig("p", str(tmp_path)),),
        (GuestConfig("a", UnixAddress(f"{tmp_path}/a"), f"{tmp_path}/a.img", "p"),),
        resize=Resizing(state_dir=f"{tmp_path}/state"),
    )
    found = samples(HostCollector(Host(config).controllers))  # nothing runs, nothing was looked at
    levels = {state: found["storaged_host_pressure", (("pool", "p"), ("state", state))] for state in LEVELS}
    assert levels == {"none": 1, "normal": 0, "low": 0, "critical": 0}
    assert [found["storaged_host_rebalances_total", (("reason", reason),)] for reason in REASONS] == [0, 0, 0]
    assert found["storaged_host_reaction_seconds_count", ()] == 0
    assert found["storaged_host_pool_size_bytes", (("pool", "p"),)] > 0
    assert found["storaged_host_guest_weight", (("vm", "a"),)] == 1
    assert found["storaged_host_image_allocated_bytes", (("vm", "a"),)] == 0
    assert not [name for name, _ in found if name.endswith(("free_bytes", "grant_bytes", "guest_up"))], (
        "what is not known is not 0"
    )


async def test_promtool_has_nothing_to_say(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await granted(bench)
        done = promtool("check", "metrics", stdin=written(HostCollector(bench.host.controllers)).encode())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


async def test_every_name_is_one_that_the_dashboards_know(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        collector = HostCollector(bench.host.controllers)
        await granted(bench)
        names = {name for name, _ in samples(collector) if not name.endswith("_created")}
        assert names <= set(HOST)
        assert set(HOST) - names <= {"storaged_host_guest_available_bytes", "storaged_host_guest_balloon_bytes"}


def test_where_they_are_served_is_a_setting() -> None:
    pool = {"pool": {"p": {"path": "/"}}}
    assert parse({**pool, "serve": {"metrics": "127.0.0.1:9848"}}).metrics == "127.0.0.1:9848"
    with pytest.raises(ConfigError, match=r"serve\.metrics"):
        parse({**pool, "serve": {"metrics": 5}})
