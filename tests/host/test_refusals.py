"""What is refused over gRPC is a bounded number of log lines, and those who watch leave room for others."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc
import grpc.aio
import pytest

from storaged.addresses import TcpAddress
from storaged.host.api import WATCHERS_MOST, HostApi
from storaged.host.config import Tls
from storaged.host.listener import Listener
from storaged.rpc.proto import common_pb2, vm_host_pb2_grpc
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc as rpc
from tests.host.test_cancel import served


async def test_strangers_that_call_all_day_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener(lambda _: False, Tls())
    (address,) = await listener.start([TcpAddress("127.0.0.1", 0)])
    assert isinstance(address, TcpAddress)
    try:
        for _ in range(3):  # each from a port of its own
            async with grpc.aio.insecure_channel(f"127.0.0.1:{address.port}") as channel:
                stub = vm_host_pb2_grpc.StartupListenerStub(channel)
                for _ in range(20):
                    with pytest.raises(grpc.aio.AioRpcError, match="no guest is configured"):
                        await stub.VmReady(common_pb2.EmptyMessage())
    finally:
        await listener.stop()
    assert [line for line in caplog.messages if "not configured" in line] == [
        "a guest that is not configured called from ipv4:127.0.0.1"
    ]


async def test_calls_that_are_refused_all_day_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with served(tmp_path, HostApi([])) as address, grpc.aio.insecure_channel(str(address)) as channel:
        stub = rpc.HostStub(channel)
        for number in range(50):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Resize(pb.ResizeRequest(guest=f"g{number}", size_bytes=1))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.CancelResize(pb.CancelResizeRequest())
    refused = [line for line in caplog.messages if "refused" in line]
    assert len(refused) == 2, refused
    assert "no guest is called 'g0'" in refused[0]


async def test_too_many_who_watch_are_told_so(tmp_path: Path) -> None:
    async with served(tmp_path, HostApi([])) as address, grpc.aio.insecure_channel(str(address)) as channel:
        stub = rpc.HostStub(channel)
        watches = [stub.Watch(pb.WatchRequest()) for _ in range(WATCHERS_MOST)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError, match="are watching already") as error:
            await anext(stub.Watch(pb.WatchRequest()).__aiter__())
        assert error.value.code() is grpc.StatusCode.ABORTED
        assert not (await stub.ListGuests(pb.ListGuestsRequest())).guests
        for watch in watches:
            watch.cancel()


async def test_without_a_console_there_is_no_link(tmp_path: Path) -> None:
    async with served(tmp_path, HostApi([])) as address, grpc.aio.insecure_channel(str(address)) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"console\.listen") as error:
            await rpc.HostStub(channel).GetConsoleLink(pb.GetConsoleLinkRequest())
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
