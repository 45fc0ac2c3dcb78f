"""The host of one machine: it hears VmReady, and calls the daemon over vsock."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from storaged.rpc.outward import Outward
from storaged.rpc.proto import (
    common_pb2,
    storaged_v1_pb2_grpc,
    vm_crash_pb2_grpc,
    vm_guest_pb2_grpc,
    vm_host_pb2_grpc,
)

EMPTY = common_pb2.EmptyMessage()
GUEST_PORT, READY_PORT, CRASH_PORT = 8888, 7777, 7779


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


class Host:
    """Listens where the guest calls, and has stubs for what the guest serves."""

    def __init__(self, uds: Path) -> None:
        self.uds = uds
        self.startup = _Listener()
        self.crashes = _Crashes()
        self._servers: list[grpc.aio.Server] = []
        self._way: Outward | None = None
        self._private = tempfile.mkdtemp(prefix="host-")
        self.relayed = f"{self._private}/guest"
        """A socket whose connections arrive at the guest's daemon over vsock: CONNECT is said for them."""
        self._channel: grpc.aio.Channel
        self.maitred: vm_guest_pb2_grpc.MaitredAsyncStub
        self.storage: storaged_v1_pb2_grpc.StorageAsyncStub

    async def listen(self) -> None:
        """Before the guest's daemon starts."""
        startup, crashes = grpc.aio.server(), grpc.aio.server()
        vm_host_pb2_grpc.add_StartupListenerServicer_to_server(self.startup, startup)
        vm_crash_pb2_grpc.add_CrashListenerServicer_to_server(self.crashes, crashes)
        for port, server in ((READY_PORT, startup), (CRASH_PORT, crashes)):
            server.add_insecure_port(f"unix:{self.uds}_{port}")
            await server.start()
            self._servers.append(server)

    async def call(self) -> None:
        """A channel to the guest."""
        self._way = Outward(connect_to(self.uds, GUEST_PORT))
        await self._way.start(self.relayed)
        self._channel = grpc.aio.insecure_channel(
            f"unix:{self.relayed}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.maitred = vm_guest_pb2_grpc.MaitredStub(self._channel)
        self.storage = storaged_v1_pb2_grpc.StorageStub(self._channel)

    @property
    def channel(self) -> grpc.aio.Channel:
        """For whoever needs more than the two stubs."""
        return self._channel

    async def close(self) -> None:
        """Nothing listens any more."""
        if self._way is not None:
            await self._channel.close()
            await self._way.close()
        for server in self._servers:
            await server.stop(0)
        with contextlib.suppress(OSError):
            Path(self._private, "guest").unlink(missing_ok=True)
            Path(self._private).rmdir()
