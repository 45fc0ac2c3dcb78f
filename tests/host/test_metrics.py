"""The host's metrics are what the controllers believe, under the names that the dashboards ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dashboards.src.series import HOST
from storaged.errors import ConfigError
from storaged.host.config import parse
from storaged.host.metrics import REASONS, HostCollector
from storaged.host.model import books
from tests.host.test_controller import until
from tests.host.test_saga_service import Bench, running


def samples(collector: HostCollector) -> dict[Any, float]:
    """By name and labels, as a scraper reads them."""
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
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
