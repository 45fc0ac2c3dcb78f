"""The host of one machine: it hears VmReady, and calls the daemon over vsock."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from storaged.rpc.outward import Outward
from storaged.rpc.proto import (
    common_pb2,
    storaged_v1_pb2,
    storaged_v1_pb2_grpc,
    vm_crash_pb2_grpc,
    vm_guest_pb2,
    vm_guest_pb2_grpc,
    vm_host_pb2_grpc,
)

EMPTY = common_pb2.EmptyMessage()
GUEST_PORT, READY_PORT, CRASH_PORT = 8888, 7777, 7779
MOST_BYTES = 16 << 20


def connect_to(uds: Path, port: int) -> Callable[[], Awaitable[socket.socket]]:
    """How to connect to a port of the guest whose vsock device has this socket."""

    async def connect() -> socket.socket:
        loop = asyncio.get_running_loop()
        way = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(way, str(uds))
            await loop.sock_sendall(way, f"CONNECT {port}\n".encode())
            answer = b""
            while not answer.endswith(b"\n"):  # byte by byte: what follows is the guest's
                if not (byte := await loop.sock_recv(way, 1)):
                    raise ConnectionRefusedError(f"nobody listens at port {port} of the guest")
                answer += byte
        except BaseException:
            way.close()
            raise
        return way

    return connect


class Calls:
    """A daemon's services as stubs, and what a host says again and again."""

    maitred: vm_guest_pb2_grpc.MaitredAsyncStub
    storage: storaged_v1_pb2_grpc.StorageAsyncStub

    async def status(self) -> vm_guest_pb2.GetResizeStatusResponse:
        """GetResizeStatus, with the host's deadline."""
        return await self.maitred.GetResizeStatus(EMPTY, timeout=20)

    async def report(self) -> storaged_v1_pb2.Report:
        """All that a storaged says of itself."""
        return await self.storage.GetReport(storaged_v1_pb2.GetReportRequest(), timeout=20)

    async def mounted(self, within_s: float = 60.0) -> storaged_v1_pb2.Report:
        """The first report of a daemon that has found its filesystem."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    return await self.report()
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                        raise
                await asyncio.sleep(0.1)

    async def minimum(self) -> int:
        """GetResizeBounds."""
        return int((await self.maitred.GetResizeBounds(EMPTY, timeout=60)).minimum_size)

    async def resize(self, size: int) -> None:
        """ResizeFilesystem, as a host calls it."""
        await self.maitred.ResizeFilesystem(vm_guest_pb2.ResizeFilesystemRequest(size=size), timeout=20)

    async def quiet(self, within_s: float = 90.0) -> vm_guest_pb2.GetResizeStatusResponse:
        """The status once no resize is under way."""
        async with asyncio.timeout(within_s):
            while (status := await self.status()).resize_in_progress:
                await asyncio.sleep(0.05)
        return status

    async def resized(self, size: int, within_s: float = 90.0) -> None:
        """Returns once the host would be content. Raises AssertionError with the daemon's reason when it would not."""
        status = await self.quiet(within_s)
        if status.current_size != size:
            raise AssertionError(f"{status.current_size} is not {size}: {(await self.report()).job}")

    async def tell_free(self, free: int) -> bool:
        """UpdateStorageBalloon; true when the guest holds to it."""
        state = vm_guest_pb2.DISK_NORMAL if free > 2 << 30 else vm_guest_pb2.DISK_LOW
        if free <= 1 << 30:
            state = vm_guest_pb2.DISK_CRITICAL
        request = vm_guest_pb2.UpdateStorageBalloonRequest(state=state, free_space_bytes=free)
        answer = await self.maitred.UpdateStorageBalloon(request, timeout=20)
        return bool(answer.result == vm_guest_pb2.SUCCESS)

    async def available(self) -> int:
        """GetAvailableSpace."""
        return int((await self.maitred.GetAvailableSpace(EMPTY, timeout=20)).available_space)


class _Listener(vm_host_pb2_grpc.StartupListenerServicer):
    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.times = 0

    async def VmReady(self, request: Any, context: Any) -> common_pb2.EmptyMessage:  # noqa: N802
        self.times += 1
        self.ready.set()
        return EMPTY

    async def VmInstallStatus(self, request: Any, context: Any) -> common_pb2.EmptyMessage:  # noqa: N802
        return EMPTY


class _Crashes(vm_crash_pb2_grpc.CrashListenerServicer):
    def __init__(self) -> None:
        self.programs: list[str] = []

    async def SendFailureReport(self, request: Any, context: Any) -> common_pb2.EmptyMessage:  # noqa: N802
        self.programs.append(request.failed_process)
        return EMPTY


class Host(Calls):
    """Listens where the guest calls, and calls what the guest serves."""

    def __init__(self, uds: Path) -> None:
        self.uds = uds
        self.hears = True
        """False: somebody else listens where VmReady comes in."""
        self.startup = _Listener()
        self.crashes = _Crashes()
        self._servers: list[grpc.aio.Server] = []
        self._ways: list[Outward] = []
        self._channels: list[grpc.aio.Channel] = []
        self._private = tempfile.mkdtemp(prefix="host-")
        self.relayed = f"{self._private}/{GUEST_PORT}"
        """A socket whose connections arrive at the guest's daemon over vsock: CONNECT is said for them."""

    async def listen(self) -> None:
        """Before the guest's daemon starts."""
        startup, crashes = grpc.aio.server(), grpc.aio.server()
        vm_host_pb2_grpc.add_StartupListenerServicer_to_server(self.startup, startup)
        vm_crash_pb2_grpc.add_CrashListenerServicer_to_server(self.crashes, crashes)
        for port, server in ((READY_PORT, startup), (CRASH_PORT, crashes)):
            if port == READY_PORT and not self.hears:
                continue
            server.add_insecure_port(f"unix:{self.uds}_{port}")
            await server.start()
            self._servers.append(server)

    async def call(self) -> None:
        """A channel to the guest's daemon."""
        first = await self.calls(GUEST_PORT)
        self.maitred, self.storage = first.maitred, first.storage

    @property
    def channel(self) -> grpc.aio.Channel:
        """For whoever needs more than the two stubs."""
        return self._channels[0]

    async def calls(self, port: int) -> Calls:
        """A channel to the daemon that listens there."""
        way, path = Outward(connect_to(self.uds, port)), f"{self._private}/{port}"
        self._ways.append(way)
        way.open(path)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", MOST_BYTES)]
        channel = grpc.aio.insecure_channel(f"unix:{path}", options=options)
        self._channels.append(channel)
        calls = Calls()
        calls.maitred = vm_guest_pb2_grpc.MaitredStub(channel)
        calls.storage = storaged_v1_pb2_grpc.StorageStub(channel)
        return calls

    async def close(self) -> None:
        """Nothing listens any more."""
        for channel in self._channels:
            await channel.close()
        for way in self._ways:
            await way.close()
        for server in self._servers:
            await server.stop(0)
        shutil.rmtree(self._private, ignore_errors=True)
