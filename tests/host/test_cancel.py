"""A cancel names a guest, a resize, or both; where both are named they must agree, whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from storaged.addresses import UnixAddress
from storaged.ctl.client import CallFailed
from storaged.ctl.host_client import HostClient
from storaged.errors import Kind, StoragedError
from storaged.host import simulated_service
from storaged.host.api import HostApi
from storaged.host.cancelling import meant
from storaged.host.config import PoolConfig
from storaged.host.console.backend import GrpcBackend
from storaged.host.controller import Controller
from storaged.host.saga_model import Outcome, Saga, Stage
from storaged.host.settings import Resizing, Sharing
from storaged.host.simulated import SimulatedHost
from storaged.host.watch import FilesystemSource, Watcher
from storaged.rpc.interceptors import StatusInterceptor
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc as rpc
from storaged.units import GIB
from tests.host.resizable import LARGE, Bench, running

A, B = Saga("a-1", "a", GIB, 1.0), Saga("b-1", "b", GIB, 1.0)
ENDED = Saga("a-0", "a", GIB, 0.5, stage=Stage.ENDED, outcome=Outcome.DONE)


@pytest.mark.parametrize(
    ("wanted", "guest", "found"), [("a-1", "a", A), ("a-1", "", A), ("", "a", A), ("b-1", "b", B), ("", "b", B)]
)
def test_what_agrees_is_meant(wanted: str, guest: str, found: Saga) -> None:
    assert meant([ENDED, A, B], wanted, guest) is found


@pytest.mark.parametrize(
    ("wanted", "guest", "kind", "says"),
    [
        ("a-1", "b", Kind.PRECONDITION, "the resize a-1 is of guest a, not of b"),
        ("a-0", "b", Kind.PRECONDITION, "the resize a-0 is of guest a, not of b"),
        ("a-0", "a", Kind.PRECONDITION, "a-0 of a has ended"),
        ("x-1", "b", Kind.NOT_FOUND, "no resize x-1 of b"),
        ("x-1", "", Kind.NOT_FOUND, "no resize x-1:"),
        ("", "c", Kind.NOT_FOUND, "no resize of c"),
    ],
)
def test_what_does_not_agree_cancels_nothing(wanted: str, guest: str, kind: Kind, says: str) -> None:
    with pytest.raises(StoragedError, match=says) as error:
        meant([ENDED, A, B], wanted, guest)
    assert error.value.kind is kind


async def test_the_runner_compares(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    async with running(bench):
        saga = await bench.resizes.begin("g", 2 * LARGE)
        for wanted, guest in ((saga.id, "other"), ("x", "g")):
            with pytest.raises(StoragedError, match=f"{wanted}.*{guest}"):
                await bench.resizes.cancel(wanted, guest)
        assert not bench.resizes.snapshot[0].cancelling
        assert (await bench.resizes.cancel(saga.id, "g")).cancelling


@contextlib.asynccontextmanager
async def served(directory: Path, servicer: rpc.HostServicer) -> AsyncIterator[UnixAddress]:
    address = UnixAddress(f"{directory}/host.sock")
    server = grpc.aio.server(interceptors=[StatusInterceptor()])
    rpc.add_HostServicer_to_server(servicer, server)
    server.add_insecure_port(str(address))
    await server.start()
    yield address
    await server.stop(None)


async def test_the_hosts_service_compares_over_all_pools(tmp_path: Path) -> None:
    """The id is of a guest in one pool, the name that of a guest in another."""
    benches, controllers = {}, []
    for name in ("p", "q"):
        os.mkdir(tmp_path / name)
        bench = benches[name] = Bench(tmp_path / name, LARGE)
        controller = Controller(
            PoolConfig(name, str(tmp_path)), [], Sharing(), Watcher(FilesystemSource(str(tmp_path))),
            lambda guest: pytest.fail(guest.name), Resizing(state_dir=str(tmp_path / name)),
        )  # fmt: skip
        controller._resizes = bench.resizes
        controllers.append(controller)
    async with (
        running(benches["p"]), running(benches["q"]), served(tmp_path, HostApi(controllers)) as address,
        grpc.aio.insecure_channel(str(address)) as channel,
    ):  # fmt: skip
        stub = rpc.HostStub(channel)
        one = await benches["p"].resizes.begin("g", 2 * LARGE)
        other = await benches["q"].resizes.begin("g", 2 * LARGE)
        benches["q"].resizes._jobs[other.id].saga = Saga(other.id, "h", LARGE, 1.0)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.CancelResize(pb.CancelResizeRequest(id=one.id, guest="h"))
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert one.id in (error.value.details() or "")
        assert "not of h" in (error.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.CancelResize(pb.CancelResizeRequest(id="x", guest="h"))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        assert not any(saga.cancelling for each in controllers for saga in each.resizes)
        await stub.CancelResize(pb.CancelResizeRequest(id=one.id, guest="g"))
        assert [saga.cancelling for saga in controllers[1].resizes] == [False]


async def test_the_console_and_the_command_line_name_both(tmp_path: Path) -> None:
    host = SimulatedHost(3)
    web = host.resize("web", host.guests["web"].size + GIB)
    address = UnixAddress(f"{tmp_path}/host.sock")
    server = await simulated_service.start(host, address)
    backend, client = GrpcBackend(address), HostClient(address)
    try:
        with pytest.raises(StoragedError, match=f"{web.id} is of guest web, not of db"):
            await backend.cancel("db", web.id)
        with pytest.raises(StoragedError, match=r"no resize x of web"):
            await backend.cancel("web", "x")

        with pytest.raises(CallFailed, match=f"{web.id} is of guest web, not of db"):
            await asyncio.to_thread(client.cancel, "db", web.id)
        assert web.state == pb.RESIZE_RUNNING
        assert (await backend.cancel("web", web.id)).state == pb.RESIZE_CANCELLING
    finally:
        client.close()
        await backend.close()
        await server.stop(None)
