"""Growth beyond a multiple of the pool's size is refused with figures, unless it is asked for in so many words."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from storaged.addresses import UnixAddress
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.host import promises, simulated_service
from storaged.host.api import HostApi
from storaged.host.config import GuestConfig, PoolConfig, parse
from storaged.host.controller import Controller
from storaged.host.overcommit import Sizes
from storaged.host.promises import Promises
from storaged.host.settings import Resizing, Sharing
from storaged.host.simulated import SimulatedHost
from storaged.host.watch import FilesystemSource, PoolError, Watcher, capacity, thin_pool_total
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc as rpc
from storaged.units import GIB, TIB
from tests.host.resizable import LARGE, Bench, running
from tests.host.test_cancel import served
from tests.host.test_controller import until


def test_a_refusal_has_all_the_figures() -> None:
    sizes = Sizes("disk", 3 * GIB, 10.0, {"a": 4 * GIB, "b": 4 * GIB})
    sizes.agree("b", 26 * GIB)
    with pytest.raises(StoragedError) as error:
        sizes.agree("b", 10 * TIB)
    assert error.value.kind is Kind.PRECONDITION
    text = error.value.message
    for figure in (
        f"{10 * TIB} bytes (10.0 TiB)", f"disk has {3 * GIB}", f"promised {10 * TIB + 4 * GIB}",
        "overcommit_limit is 10", f"at most {26 * GIB} bytes (26.0 GiB)", "--allow-overcommit", "allow_overcommit",
    ):  # fmt: skip
        assert figure in text, figure


def test_a_guest_keeps_what_it_has_whatever_the_limit() -> None:
    sizes = Sizes("p", GIB, 1.0, {"a": 4 * GIB, "b": 4 * GIB})
    assert sizes.accepted("a") == 4 * GIB
    assert sizes.accepted("new") == 0
    sizes.agree("a", 4 * GIB)


def test_what_is_not_known_is_not_guessed() -> None:
    with pytest.raises(StoragedError, match="not known yet") as error:
        Sizes("p", 0, 10.0, {}).agree("a", GIB)
    assert error.value.kind is Kind.UNAVAILABLE


@contextlib.asynccontextmanager
async def host(directory: Path, limit: float) -> AsyncIterator[tuple[rpc.HostAsyncStub, Bench]]:
    """A service of one pool with one guest `g` of LARGE; its pool takes `limit` bytes of promises."""
    bench = Bench(directory, LARGE)
    controller = Controller(
        PoolConfig("p", str(directory)),
        [GuestConfig("g", UnixAddress(f"{directory}/none.sock"), str(bench.path), "p")],
        Sharing(overcommit_limit=limit / capacity(str(directory))),
        Watcher(FilesystemSource(str(directory))),
        lambda guest: pytest.fail(guest.name),
        Resizing(state_dir=str(directory)),
    )
    controller._resizes = bench.resizes
    async with (
        running(bench), served(directory, HostApi([controller])) as address,
        grpc.aio.insecure_channel(str(address)) as channel,
    ):  # fmt: skip
        yield rpc.HostStub(channel), bench


async def test_the_hosts_service_refuses_and_is_overridden(tmp_path: Path) -> None:
    async with host(tmp_path, LARGE + GIB + 8192) as (stub, bench):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Resize(pb.ResizeRequest(guest="g", size_bytes=LARGE + 2 * GIB))
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "overcommit_limit" in (error.value.details() or "")
        assert bench.sizes() == (LARGE, LARGE)
        begun = await stub.Resize(pb.ResizeRequest(guest="g", size_bytes=LARGE + 2 * GIB, allow_overcommit=True))
        pool = await stub.GetPool(pb.GetPoolRequest())
        assert pool.sizes_bytes == LARGE + 2 * GIB, "a resize under way counts"
        assert pool.sizes_limit_bytes == pytest.approx(LARGE + GIB + 8192, abs=4096)
        await bench.ends(begun.resize.id)
        assert bench.sizes() == (LARGE + 2 * GIB, LARGE + 2 * GIB)
        # It is over the limit now, and may be made smaller all the same.
        begun = await stub.Resize(pb.ResizeRequest(guest="g", size_bytes=LARGE + GIB + GIB // 2))
        await bench.ends(begun.resize.id)


async def test_growth_within_the_limit_needs_no_word(tmp_path: Path) -> None:
    async with host(tmp_path, LARGE + GIB + 8192) as (stub, bench):
        begun = await stub.Resize(pb.ResizeRequest(guest="g", size_bytes=LARGE + GIB))
        await bench.ends(begun.resize.id)


def two(directory: Path) -> tuple[Any, Promises]:
    """A pool of which two guests of no size may have 3 GiB in all."""
    members = {
        name: SimpleNamespace(config=SimpleNamespace(image=f"{directory}/{name}", size=0)) for name in ("a", "b")
    }
    controller: Any = SimpleNamespace(
        pool=PoolConfig("p", str(directory)),
        members=members,
        resizes=(),
        state=SimpleNamespace(guests={}, settings=Sharing(overcommit_limit=3 * GIB / capacity(str(directory)))),
    )
    return controller, Promises([controller], lambda _: 0)


async def test_two_that_begin_at_once_do_not_pass_by_the_same_room(tmp_path: Path) -> None:
    controller, promises = two(tmp_path)
    async with promises.growth(controller, "a", 2 * GIB, allowed=False):
        with pytest.raises(StoragedError, match="overcommit_limit"):
            async with promises.growth(controller, "b", 2 * GIB, allowed=False):
                pytest.fail("both began")
    async with promises.growth(controller, "b", 2 * GIB, allowed=False):
        pass  # the first did not begin after all


async def test_a_pool_that_cannot_be_read_lets_nobody_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: PoolConfig) -> int:
        raise PoolError("it hangs")

    monkeypatch.setattr(promises, "backing", gone)
    controller, asked = two(tmp_path)
    with pytest.raises(StoragedError, match="not known yet"):
        async with asked.growth(controller, "a", GIB, allowed=False):
            pytest.fail("it began")
    async with asked.growth(controller, "a", GIB, allowed=True):
        await asyncio.sleep(0)


def test_the_simulated_host_has_the_same_limit() -> None:
    host = SimulatedHost(3)
    with pytest.raises(StoragedError, match="overcommit_limit"):
        host.resize("web", 100 * TIB)
    assert host.guests["web"].job is None
    assert host.resize("web", 100 * TIB, allow_overcommit=True).to_bytes == 100 * TIB


def test_a_thin_pools_size_is_that_of_its_data() -> None:
    status = "0 2097152 thin-pool 0 30/1024 128/8192 - rw discard_passdown queue_if_no_space - 1024"
    assert thin_pool_total(status, 65536) == 8192 * 65536
    with pytest.raises(PoolError):
        thin_pool_total("0 1 thin-pool Fail", 65536)


def test_the_limit_is_a_number() -> None:
    pool = {"pool": {"p": {"path": "/x"}}}
    assert parse(pool).sharing.overcommit_limit == 10
    assert parse({**pool, "sharing": {"overcommit_limit": 2.5}}).sharing.overcommit_limit == 2.5
    for wrong in ("10", True, 0, -1):
        with pytest.raises(ConfigError, match="overcommit_limit"):
            parse({**pool, "sharing": {"overcommit_limit": wrong}})


async def test_the_command_line_overrides_in_so_many_words(tmp_path: Path) -> None:
    host, address = SimulatedHost(3), UnixAddress(f"{tmp_path}/host.sock")
    server = await simulated_service.start(host, address)
    command = [sys.executable, "-m", "storaged.ctl.main", "--host", str(address), "resize", "web", "90T", "--yes"]
    try:
        refused = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, said = await refused.communicate()
        assert refused.returncode == 1
        assert b"overcommit_limit" in said
        assert host.guests["web"].job is None
        begun = await asyncio.create_subprocess_exec(*command, "--allow-overcommit")
        await until(lambda: host.guests["web"].job is not None)
        begun.kill()
        await begun.wait()
    finally:
        await server.stop(None)
