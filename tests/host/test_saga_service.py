"""`storaged.host.v1.Host` as the command line and the console see it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest

from lab.agent import agent, serve
from storaged.addresses import TcpAddress, UnixAddress
from storaged.errors import ConfigError, StoragedError
from storaged.host import encode
from storaged.host.config import GuestConfig, HostConfig, PoolConfig, parse
from storaged.host.history import COARSE, FINE, History, Point
from storaged.host.levels import Level
from storaged.host.saga_model import Outcome, Saga, Stage
from storaged.host.service import Host
from storaged.host.settings import Resizing
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc
from storaged.units import GIB
from tests.host.test_controller import until


@dataclass
class Bench:
    """A host with two pools, and stubs that reach it over its two doors."""

    host: Host
    stub: storaged_host_v1_pb2_grpc.HostAsyncStub
    outside: storaged_host_v1_pb2_grpc.HostAsyncStub
    socket: Path


@contextlib.asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Bench]:
    image = directory / "a.img"
    elsewhere = tempfile.TemporaryDirectory(dir="/dev/shm")  # a pool has a filesystem of its own
    other = f"{elsewhere.name}/z.img"
    for each in (str(image), other):
        os.close(os.open(each, os.O_CREAT | os.O_WRONLY, 0o600))
        os.truncate(each, 20 * GIB)
    server = await serve(agent(), directory / "a.sock")
    socket = directory / "host.sock"
    config = HostConfig(
        (PoolConfig("p", str(directory)), PoolConfig("q", elsewhere.name)),
        (
            GuestConfig("a", UnixAddress(f"{directory}/a.sock"), str(image), "p", weight=2.0),
            GuestConfig("z", UnixAddress(f"{directory}/z.sock"), other, "q", pid_file=f"{directory}/none"),
        ),
        (UnixAddress(str(socket)), TcpAddress("127.0.0.1", 0)),
        resize=Resizing(state_dir=f"{directory}/state"),
    )
    host = Host(config)
    task = asyncio.create_task(host.run())
    try:
        await until(lambda: len(host.listening) == 2)
        port = next(each.port for each in host.listening if isinstance(each, TcpAddress))
        async with (
            grpc.aio.insecure_channel(f"unix:{socket}") as inside,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as outside,
        ):
            yield Bench(
                host,
                storaged_host_v1_pb2_grpc.HostStub(inside),
                storaged_host_v1_pb2_grpc.HostStub(outside),
                socket,
            )
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(None)
        elsewhere.cleanup()


async def refused(call: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code()


async def test_what_is_known_is_told(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        assert stat.S_IMODE(os.stat(bench.socket).st_mode) == 0o600
        reports = bench.stub.Watch(pb.WatchRequest(history_once=True)).__aiter__()
        while True:
            report = await anext(reports)
            by_name = {guest.name: guest for guest in report.guests}
            if by_name["a"].HasField("grant_bytes") and "no storaged" in by_name["a"].stale_reason:
                break
        assert list(by_name) == ["a", "z"]
        a, z = by_name["a"], by_name["z"]
        assert (a.pool, a.state, a.weight, a.logical_bytes) == ("p", pb.GUEST_UP, 2.0, 20 * GIB)
        assert a.grant_bytes > 0
        assert 0 < a.left_bytes <= 20 * GIB, "never more than its disk"
        assert not a.HasField("balloon_bytes"), "what is not known is not zero"
        assert a.resizable
        assert (z.state, z.resizable, z.stale_reason) == (pb.GUEST_CONFIGURED, False, "it does not run")
        pool = await bench.stub.GetPool(pb.GetPoolRequest(name="p"))
        assert (pool.name, pool.path, pool.level, pool.guest_count) == ("p", str(tmp_path), pb.LEVEL_NORMAL, 1)
        assert pool.total_bytes > pool.free_bytes > pool.reserve_bytes > 0
        assert 0 < pool.promised_bytes + pool.unbound_bytes <= pool.free_bytes - pool.reserve_bytes
        assert pool.history[-1].free_bytes > 0
        later = await anext(reports)
        assert later.sequence > report.sequence
        assert not later.pools[0].history
        listed = await bench.stub.ListGuests(pb.ListGuestsRequest(pool="q"))
        assert [guest.name for guest in listed.guests] == ["z"]


async def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        stub = bench.stub
        await until(lambda: bench.host.controllers[0].members["a"].running)
        codes = grpc.StatusCode
        assert await refused(stub.GetPool(pb.GetPoolRequest())) is codes.INVALID_ARGUMENT
        assert await refused(stub.GetPool(pb.GetPoolRequest(name="x"))) is codes.NOT_FOUND
        assert await refused(stub.ListGuests(pb.ListGuestsRequest(pool="x"))) is codes.NOT_FOUND
        assert await refused(stub.Resize(pb.ResizeRequest(guest="x", size_bytes=GIB))) is codes.NOT_FOUND
        assert await refused(stub.Resize(pb.ResizeRequest(guest="a", size_bytes=1))) is codes.INVALID_ARGUMENT
        # Its image holds no filesystem: nothing that could be checked, so nothing is touched.
        assert await refused(stub.Resize(pb.ResizeRequest(guest="a", size_bytes=GIB))) is codes.FAILED_PRECONDITION
        assert await refused(stub.CancelResize(pb.CancelResizeRequest())) is codes.INVALID_ARGUMENT
        assert await refused(stub.CancelResize(pb.CancelResizeRequest(guest="a"))) is codes.NOT_FOUND
        assert os.stat(tmp_path / "a.img").st_size == 20 * GIB
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await anext(stub.Watch(pb.WatchRequest(min_interval_s=-1)).__aiter__())
        assert error.value.code() is codes.INVALID_ARGUMENT


async def test_guests_that_announce_themselves_over_tcp_can_resize_nobody(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        assert await refused(bench.outside.ListGuests(pb.ListGuestsRequest())) is grpc.StatusCode.UNIMPLEMENTED
        resize = pb.ResizeRequest(guest="a", size_bytes=GIB)
        assert await refused(bench.outside.Resize(resize)) is grpc.StatusCode.UNIMPLEMENTED


async def test_a_journal_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "state" / "resizes-p.json").mkdir(parents=True)
    config = HostConfig((PoolConfig("p", str(tmp_path)),), resize=Resizing(state_dir=f"{tmp_path}/state"))
    with pytest.raises(StoragedError, match=r"resizes-p\.json"):
        await Host(config).run()


def test_a_resize_is_told_as_it_is() -> None:
    saga = Saga("i", "g", 2 * GIB, 1.5, start=GIB)
    told = encode.resize(saga)
    assert (told.state, told.stage, told.from_bytes, told.to_bytes) == (
        pb.RESIZE_RUNNING, pb.STAGE_PREPARING, GIB, 2 * GIB,
    )  # fmt: skip
    assert not told.HasField("image_bytes")
    assert not told.HasField("ended_at")
    assert {encode.resize(Saga("i", "g", 1, 1.0, stage=stage)).stage for stage in Stage} == set(
        range(1, len(Stage) + 1)
    )
    for outcome, state in (
        (Outcome.DONE, pb.RESIZE_DONE),
        (Outcome.FAILED, pb.RESIZE_FAILED),
        (Outcome.CANCELLED, pb.RESIZE_CANCELLED),
    ):
        assert encode.resize(Saga("i", "g", 1, 1.0, stage=Stage.ENDED, outcome=outcome)).state == state
    assert encode.resize(Saga("i", "g", 1, 1.0, cancelling=True)).state == pb.RESIZE_CANCELLING


def test_history_is_long_and_never_grows() -> None:
    history = History()
    for second in range(200_000):
        history.add(Point(float(second), second, 1, 1, Level.NORMAL))
        history.add(Point(second + 0.3, second, 1, 1, Level.NORMAL))
    points = history.points()
    assert FINE < len(points) <= FINE + COARSE
    assert [point.at for point in points] == sorted({point.at for point in points})
    assert points[-1].at - points[0].at > 80_000
    history.add(Point(200_000.1, 1, 1, 1, Level.CRITICAL))
    assert history.points()[-1].level is Level.CRITICAL, "a crossing is never left out"


GUEST = {"address": "unix:/a", "image": "/i"}


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"guest": {"g": {**GUEST, "control": "xen:/x"}}}, "guest.g.control"),
        ({"guest": {"g": {**GUEST, "control": "qmp:relative"}}}, "guest.g.control"),
        ({"guest": {"g": {**GUEST, "control": "crosvm:/s", "disk": "vda"}}}, "guest.g.disk"),
        ({"resize": {"state_dir": "x"}}, "resize.state_dir"),
        ({"resize": {"patience_s": 0}}, "resize.patience_s"),
        ({"resize": {"keep": 1.5}}, "resize.keep"),
        ({"resize": {"other": 1}}, "resize.other"),
    ],
)
def test_settings_are_checked(tables: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse({"pool": {"p": {"path": "/x"}}, **tables})


def test_settings_are_taken() -> None:
    config = parse({
        "pool": {"p": {"path": "/x"}},
        "guest": {"g": {**GUEST, "control": "qmp:/run/q", "disk": "vd0"}, "h": {"address": "unix:/h", "image": "/h"}},
        "resize": {"patience_s": 5, "state_dir": "/s"},
    })  # fmt: skip
    assert [(guest.control, guest.disk) for guest in config.guests] == [("qmp:/run/q", "vd0"), ("loop", "")]
    assert (config.resize.patience_s, config.resize.state_dir) == (5, "/s")
