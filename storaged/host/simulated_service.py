"""The made-up host behind its gRPC service and its console: everything that people use, without root."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from storaged.addresses import UnixAddress
from storaged.errors import StoragedError
from storaged.host.console.settings import ConsoleSettings
from storaged.host.links import ConsoleLinks, console_link
from storaged.host.simulated import POOL, NotKnown, SimulatedHost
from storaged.host.sockets import clear
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc as rpc
from storaged.rpc.status import CODES

log = logging.getLogger(__name__)


class SimulatedService(rpc.HostServicer):
    """`storaged.host.v1` as the made-up host answers it."""

    def __init__(self, host: SimulatedHost, console: ConsoleLinks | None = None) -> None:
        self.host = host
        self._console = console

    async def ListGuests(self, request: pb.ListGuestsRequest, context: Any) -> pb.ListGuestsResponse:
        if request.pool not in ("", POOL):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no pool is called {request.pool!r}; known: {POOL}")
        return pb.ListGuestsResponse(guests=[self.host.guest(name) for name in sorted(self.host.guests)])

    async def GetPool(self, request: pb.GetPoolRequest, context: Any) -> pb.Pool:
        if request.name not in ("", POOL):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no pool is called {request.name!r}; known: {POOL}")
        return self.host.pool(history=True)

    async def Resize(self, request: pb.ResizeRequest, context: Any) -> pb.ResizeResponse:
        try:
            return pb.ResizeResponse(
                resize=self.host.resize(request.guest, request.size_bytes, allow_overcommit=request.allow_overcommit)
            )
        except StoragedError as error:
            await _abort(context, error)
            raise

    async def CancelResize(self, request: pb.CancelResizeRequest, context: Any) -> pb.CancelResizeResponse:
        try:
            return pb.CancelResizeResponse(resize=self.host.cancel(request.guest, request.id))
        except StoragedError as error:
            await _abort(context, error)
            raise

    async def LiftFence(self, request: pb.LiftFenceRequest, context: Any) -> pb.LiftFenceResponse:
        if request.guest not in self.host.guests:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no guest is called {request.guest!r}")
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{request.guest} is not fenced")
        raise AssertionError

    async def GetConsoleLink(self, request: pb.GetConsoleLinkRequest, context: Any) -> pb.GetConsoleLinkResponse:  # noqa: ARG002
        try:
            return console_link(self._console)
        except StoragedError as error:
            await _abort(context, error)
            raise

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Report]:  # noqa: ARG002
        history = True
        while True:
            yield self.host.report(history=history)
            history = not request.history_once
            await asyncio.sleep(request.min_interval_s or 0.2)
            await self.host.next()


async def _abort(context: Any, error: StoragedError) -> None:
    code = grpc.StatusCode.NOT_FOUND if isinstance(error, NotKnown) else CODES[error.kind]
    await context.abort(code, error.message)


async def start(host: SimulatedHost, address: UnixAddress, console: ConsoleLinks | None = None) -> grpc.aio.Server:
    """Serve it; the caller stops it."""
    clear(address.path)
    server = grpc.aio.server()
    rpc.add_HostServicer_to_server(SimulatedService(host, console), server)
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(str(address))
    finally:
        os.umask(mask)
    await server.start()
    return server


async def serve(count: int, address: UnixAddress, settings: ConsoleSettings) -> None:
    """Until SIGTERM or SIGINT."""
    from storaged.host.console.backend import GrpcBackend
    from storaged.host.console.server import Console

    console = Console(settings, GrpcBackend(address)) if settings.listen else None
    if console is not None:
        console.bind()
    host = SimulatedHost(count)
    server = await start(host, address, console)
    log.info("%d simulated guests; asked at %s", count, address)
    if console is not None and console.expires_s is not None:
        log.info("sign in to the console, once and within %g s: %s", console.expires_s, console.link())
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(host.run())]
        if console is not None:
            tasks.append(group.create_task(console.run()))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, lambda: [task.cancel() for task in tasks])
    await server.stop(0.5)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address.path)
