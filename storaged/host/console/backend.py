"""What the console asks of the host: a port, and the host's gRPC service behind it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Protocol

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from storaged.addresses import Address, TcpAddress, UnixAddress
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc as rpc

ANSWER_WITHIN_S = 20.0
_KINDS = {
    grpc.StatusCode.INVALID_ARGUMENT: Kind.INVALID,
    grpc.StatusCode.OUT_OF_RANGE: Kind.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION: Kind.PRECONDITION,
    grpc.StatusCode.NOT_FOUND: Kind.PRECONDITION,
    grpc.StatusCode.ABORTED: Kind.BUSY,
    grpc.StatusCode.UNAVAILABLE: Kind.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Kind.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED: Kind.UNSUPPORTED,
}
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),  # a thousand guests and a long history
]


class Backend(Protocol):
    """The host's service. Every failure is a StoragedError with a sentence for the person who asked."""

    def watch(self, interval_s: float) -> AsyncIterator[pb.Report]:
        """A report at once and after every change; ends with an error."""
        ...

    async def resize(self, guest: str, size: int, *, allow_overcommit: bool = False) -> pb.Resize:
        """Begin a resize."""
        ...

    async def cancel(self, guest: str, resize: str) -> pb.Resize:
        """Ask the guest's resize with this id to stop; without one, the guest's."""
        ...

    async def close(self) -> None:
        """End all calls."""
        ...


class GrpcBackend:
    """The service at `address`: the console sees what the command line sees, no more and no less."""

    def __init__(self, address: Address) -> None:
        if isinstance(address, UnixAddress):
            target = str(address)
        elif isinstance(address, TcpAddress) and address.loopback:
            target = f"{address.host}:{address.port}"
        else:
            raise ConfigError(f"{address}: the console asks a unix socket or a loopback address")
        self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self._host = rpc.HostStub(self._channel)

    async def watch(self, interval_s: float) -> AsyncIterator[pb.Report]:
        request = pb.WatchRequest(min_interval_s=interval_s, history_once=True)
        try:
            async for report in self._host.Watch(request):
                yield report
        except grpc.aio.AioRpcError as error:
            raise _explained(error) from None
        raise StoragedError("storaged-host has ended the connection", Kind.UNAVAILABLE)

    async def resize(self, guest: str, size: int, *, allow_overcommit: bool = False) -> pb.Resize:
        try:
            request = pb.ResizeRequest(guest=guest, size_bytes=size, allow_overcommit=allow_overcommit)
            return (await self._host.Resize(request, timeout=ANSWER_WITHIN_S)).resize
        except grpc.aio.AioRpcError as error:
            raise _explained(error) from None

    async def cancel(self, guest: str, resize: str) -> pb.Resize:
        request = pb.CancelResizeRequest(id=resize, guest=guest)
        try:
            return (await self._host.CancelResize(request, timeout=ANSWER_WITHIN_S)).resize
        except grpc.aio.AioRpcError as error:
            raise _explained(error) from None

    async def close(self) -> None:
        await self._channel.close()


def _explained(error: grpc.aio.AioRpcError) -> StoragedError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return StoragedError(f"storaged-host did not answer within {ANSWER_WITHIN_S:g} s", Kind.UNAVAILABLE)
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        return StoragedError("storaged-host cannot be reached; is it running?", Kind.UNAVAILABLE)
    return StoragedError(details or f"storaged-host answered {code.name}", _KINDS.get(code, Kind.INTERNAL))
