"""Where guests announce themselves, `vm_tools.StartupListener`, and on unix sockets the host's own service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from storaged.addresses import Address, TcpAddress, UnixAddress
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.host.config import Tls
from storaged.host.doors import Doors
from storaged.host.sockets import clear
from storaged.quiet import BoundedLog
from storaged.rpc.interceptors import StatusInterceptor
from storaged.rpc.proto import common_pb2, vm_host_pb2, vm_host_pb2_grpc

log = logging.getLogger(__name__)

Ready = Callable[[str], bool]
"""Called with whence a guest called, as in `ipv4:10.0.0.5` or `unix:`; False when no guest is known there."""


def peer_name(peer: str) -> str:
    """gRPC's peer without its port, brackets and escapes: `ipv6:%5B::1%5D:4711` is `ipv6:::1`."""
    kind, _, rest = unquote(peer).partition(":")
    if kind in {"ipv4", "ipv6"}:
        return f"{kind}:{rest.rpartition(':')[0].strip('[]')}"
    return f"{kind}:{rest}"


class _Listener(vm_host_pb2_grpc.StartupListenerServicer):
    def __init__(self, ready: Ready, came_from: Callable[[str], str]) -> None:
        self._ready = ready
        self._came_from = came_from
        self._refusals = BoundedLog(log)

    async def VmReady(  # noqa: N802  # named as in the contract
        self,
        request: common_pb2.EmptyMessage,  # noqa: ARG002  # it is empty
        context: Any,
    ) -> common_pb2.EmptyMessage:
        peer = self._came_from(context.peer())
        if not self._ready(peer):
            self._refusals.note(peer, "not configured", f"a guest that is not configured called from {peer}")
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no guest is configured with this peer")
        return common_pb2.EmptyMessage()

    async def VmInstallStatus(  # noqa: N802  # named as in the contract
        self,
        request: vm_host_pb2.VmInstallState,  # noqa: ARG002  # nothing in it is known
        context: Any,  # noqa: ARG002  # as above
    ) -> common_pb2.EmptyMessage:
        return common_pb2.EmptyMessage()


class Listener:
    """Serves guests' announcements on any number of addresses, and on unix sockets alone what `local` adds.

    `hybrid`: paths at which machine monitors connect for their guests.
    """

    def __init__(
        self,
        ready: Ready,
        tls: Tls,
        local: Callable[[grpc.aio.Server], None] | None = None,
        hybrid: Sequence[str] = (),
    ) -> None:
        self._server, self._local = _server(ready, self._came_from), _server(ready, peer_name)
        self._hybrid = hybrid
        self._doors: Doors | None = None
        if local is not None:
            local(self._local)
        self._tls = tls
        self._sockets: list[str] = []

    async def start(self, addresses: Sequence[Address]) -> list[Address]:
        """Serve; the addresses with the ports chosen for port 0. Raises StoragedError."""
        bound = [self._bind(address) for address in addresses]
        for path in self._hybrid:
            self._guest_doors().listen_hybrid(path)
        await self._server.start()
        await self._local.start()
        return bound

    def _bind(self, address: Address) -> Address:
        try:
            if isinstance(address, UnixAddress):
                if not os.path.isdir(os.path.dirname(address.path)):
                    raise ConfigError(f"serve.listen = {str(address)!r}: there is no directory for it")
                clear(address.path)
                mask = os.umask(0o177)  # ours alone from the moment it exists
                try:
                    self._local.add_insecure_port(str(address))
                finally:
                    os.umask(mask)
                self._sockets.append(address.path)
                return address
            if isinstance(address, TcpAddress):
                target = f"{address.host}:{address.port}"
                if self._tls.key:
                    return TcpAddress(address.host, self._server.add_secure_port(target, _credentials(self._tls)))
                if address.loopback:
                    return TcpAddress(address.host, self._server.add_insecure_port(target))
                raise ConfigError(f"{address} needs [tls]: it is not a loopback address")
        except RuntimeError as error:
            # What follows is gRPC's advice on its own logging.
            why = str(error).partition(";")[0]
            raise StoragedError(f"cannot listen on {address}: {why}", Kind.UNAVAILABLE) from error
        return self._guest_doors().listen(address)

    def _guest_doors(self) -> Doors:
        if self._doors is None:
            self._doors = Doors()
            self._server.add_insecure_port(f"unix:{self._doors.backend}")
        return self._doors

    def _came_from(self, peer: str) -> str:
        """Who a peer is; a socket of the doors stands for the guest that came in there."""
        name = peer_name(peer)
        return (self._doors.peer(name) if self._doors is not None else None) or name

    async def stop(self) -> None:
        """Take no more calls."""
        await asyncio.gather(self._server.stop(0.5), self._local.stop(0.5))
        if self._doors is not None:
            await self._doors.close()
        for path in self._sockets:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _server(ready: Ready, came_from: Callable[[str], str]) -> grpc.aio.Server:
    server = grpc.aio.server(
        interceptors=[StatusInterceptor()],
        maximum_concurrent_rpcs=256,
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 16)],
    )
    vm_host_pb2_grpc.add_StartupListenerServicer_to_server(_Listener(ready, came_from), server)
    return server


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    contents = []
    for path in (tls.key, tls.certificate, tls.authority):
        try:
            with open(path, "rb") as file:
                contents.append(file.read())
        except OSError as error:
            raise ConfigError(f"TLS file {path}: {error.strerror}") from error
    return grpc.ssl_server_credentials(
        [(contents[0], contents[1])], root_certificates=contents[2], require_client_auth=True
    )
