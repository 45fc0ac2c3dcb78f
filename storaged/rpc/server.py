"""The gRPC server: which services, on which addresses, with which limits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import replace

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from storaged.addresses import Address, TcpAddress, UnixAddress, VsockAddress
from storaged.config import LimitsConfig, TlsConfig, VsockConfig
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.guest.clock import Clock
from storaged.guest.containers import Containers
from storaged.guest.mounts import Mounts
from storaged.guest.network import Network
from storaged.guest.power import Power
from storaged.guest.processes import Processes
from storaged.guest.resolv import Resolv
from storaged.guest.termina import Termina
from storaged.guest.users import Users
from storaged.rpc.calls import CallInterceptor, Calls
from storaged.rpc.extension import Storage
from storaged.rpc.interceptors import StatusInterceptor
from storaged.rpc.maitred import Maitred
from storaged.rpc.power import PowerControl
from storaged.rpc.private import PrivateDirectory, sweep
from storaged.rpc.proto import storaged_v1_pb2, storaged_v1_pb2_grpc, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.rpc.vsock import Relay
from storaged.runtime import StorageService

QUIET_S, QUIET_WITHIN_S = 0.03, 0.5


def credentials(tls: TlsConfig) -> grpc.ServerCredentials | None:
    """What gRPC needs to serve with TLS; None without. Raises ConfigError when a file cannot be read."""
    if not tls.certificate:
        return None
    contents = []
    for path in (tls.key, tls.certificate, tls.client_authority):
        try:
            with open(path, "rb") as file:
                contents.append(file.read())
        except OSError as error:
            raise ConfigError(f"TLS file {path}: {error.strerror}") from error
    return grpc.ssl_server_credentials(
        [(contents[0], contents[1])], root_certificates=contents[2], require_client_auth=True
    )


class Server:
    """One gRPC server on any number of addresses."""

    def __init__(
        self,
        storage: StorageService,
        *,
        network: Network | None = None,
        resolv: Resolv | None = None,
        clock: Clock | None = None,
        processes: Processes | None = None,
        mounts: Mounts | None = None,
        termina: Termina | None = None,
        containers: Containers | None = None,
        users: Users | None = None,
        power: Power | None = None,
        limits: LimitsConfig | None = None,
        vsock: VsockConfig | None = None,
    ) -> None:
        limits = limits or LimitsConfig()
        self.calls = Calls()
        self._gate = CallInterceptor(limits, self.calls)
        streams = limits.calls + limits.streams
        self._server = grpc.aio.server(
            interceptors=[self._gate, StatusInterceptor()],
            maximum_concurrent_rpcs=4 * streams,  # the gate refuses far below this, and counts what it refuses
            options=[
                ("grpc.so_reuseport", 0),  # a second daemon on our port is an error, not a share of the calls
                ("grpc.max_receive_message_length", limits.message_bytes),
                ("grpc.max_concurrent_streams", limits.calls_per_connection),
                ("grpc.http2.bdp_probe", 0),  # or the windows grow to megabytes for each stream that waits
                ("grpc.max_metadata_size", 16 << 10),
                ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
                ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", int(limits.keepalive_wait_s * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients may ask as often, not more
            ],
        )
        self.power = None if power is None else PowerControl(storage, power, self.refuse)
        maitred = Maitred(
            storage,
            network=network,
            resolv=resolv,
            clock=clock,
            processes=processes,
            mounts=mounts,
            termina=termina,
            containers=containers,
            users=users,
            power=self.power,
        )
        vm_guest_pb2_grpc.add_MaitredServicer_to_server(maitred, self._server)
        storaged_v1_pb2_grpc.add_StorageServicer_to_server(Storage(storage), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = (
            vm_guest_pb2.DESCRIPTOR.services_by_name["Maitred"].full_name,
            storaged_v1_pb2.DESCRIPTOR.services_by_name["Storage"].full_name,
        )
        reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._sockets: list[str] = []
        self._vsock = vsock or VsockConfig()
        self.relay: Relay | None = None
        self._private: PrivateDirectory | None = None

    def refuse(self, reason: str) -> None:
        """Answer every new call with UNAVAILABLE and `reason`; an empty one lets them in again."""
        self._gate.refuse = reason

    def reconfigure(self, limits: LimitsConfig, vsock: VsockConfig) -> None:
        """Take what can change while serving: the deadline, and who may connect over vsock."""
        self._gate.limits = replace(self._gate.limits, call_s=limits.call_s)
        self._vsock = vsock
        if self.relay is not None:
            self.relay.config = vsock

    async def start(self, addresses: Sequence[Address], tls: TlsConfig | None = None) -> list[Address]:
        """Serve on `addresses`; the addresses with the ports that were chosen for port 0. Raises StoragedError."""
        tls = tls or TlsConfig()
        bound: list[Address] = [
            address if isinstance(address, VsockAddress) else self._bind(address, tls) for address in addresses
        ]
        if any(isinstance(address, VsockAddress) for address in addresses):
            if not self._sockets:
                sweep()
                self._private = PrivateDirectory()
                self._bind_unix(UnixAddress(self._private.socket("grpc")))
            self.relay = Relay(self._sockets[0], self._vsock)
            # Connections wait until the server runs: they are taken on this loop.
            bound = [self.relay.listen(one) if isinstance(one, VsockAddress) else one for one in bound]
        await self._server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    def _bind(self, address: UnixAddress | TcpAddress, tls: TlsConfig) -> Address:
        try:
            if isinstance(address, UnixAddress):
                return self._bind_unix(address)
            if (secure := credentials(tls)) is not None:
                port = self._server.add_secure_port(f"{address.host}:{address.port}", secure)
            elif tls.insecure and address.loopback:
                port = self._server.add_insecure_port(f"{address.host}:{address.port}")
            else:
                raise ConfigError(
                    f"{address} needs TLS with client certificates (--tls-cert, --tls-key, --tls-client-ca),"
                    " unless it is a loopback address and --insecure is given"
                )
            return TcpAddress(address.host, port)
        except RuntimeError as error:
            raise StoragedError(f"cannot listen on {address}: {error}", Kind.UNAVAILABLE) from error

    def _bind_unix(self, address: UnixAddress) -> Address:
        if _somebody_listens(address.path):
            raise StoragedError(f"{address} is served by another process", Kind.BUSY)
        mask = os.umask(0o177)  # the socket is ours alone from the moment it exists
        try:
            self._server.add_insecure_port(f"unix:{address.path}")
        finally:
            os.umask(mask)
        self._sockets.append(address.path)
        return address

    async def flushed(self, within_s: float) -> None:
        """Returns once every answer has left, or `within_s` is over."""
        if self.relay is not None:
            await self.relay.flushed(within_s)

    async def _quiet(self) -> None:
        """Returns once no call came for a moment: gRPC cuts off those that it took but has not begun when it stops."""
        seen, loop = -1, asyncio.get_running_loop()
        until = loop.time() + QUIET_WITHIN_S
        while seen != (count := sum(self.calls.started.values())) and loop.time() < until:
            seen = count
            await asyncio.sleep(QUIET_S)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let running ones finish within `grace_s`."""
        if self.relay is not None:
            self.relay.stop_listening()
        await self._health.enter_graceful_shutdown()
        self.refuse(self._gate.refuse or "storaged is stopping")
        await self._quiet()
        await self._server.stop(grace_s)
        if self.relay is not None:
            await self.relay.flushed(1.0)
            await self.relay.close()
        for path in self._sockets:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        if self._private is not None:
            self._private.remove()


def _somebody_listens(path: str) -> bool:
    """True when a process answers there; raises ConfigError when something else than a socket is in the way."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"unix:{path}: there is already something that is not a socket")
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
