"""One guest's storaged, as plain calls: every failure is a CallFailed with a sentence for the person who asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

# gRPC would write its own view of a refused handshake to stderr, where one line is what we promise.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from storaged.addresses import Address, TcpAddress, UnixAddress
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.rpc.proto import common_pb2, storaged_v1_pb2, storaged_v1_pb2_grpc, vm_guest_pb2, vm_guest_pb2_grpc

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")
ANSWER_WITHIN_S = 20.0
WORK_WITHIN_S = 600.0
"""A trim of a large disk and the last step of a cancelled job take their time."""
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a guest is never reached through the web's proxy
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
NO_CONNECTION = ("failed to connect", "connections to all backends failing", "dns resolution", "dns query failed")
BROKEN = ("socket closed", "recvmsg", "sendmsg", "connection reset", "broken pipe", "stream removed", "goaway")
"""How gRPC's own words begin when a connection ends under a call."""


class CallFailed(StoragedError):
    """A call that storaged refused or did not answer. `lost` is true when there was nobody to answer it."""

    def __init__(self, message: str, kind: Kind, *, lost: bool = False) -> None:
        super().__init__(message, kind)
        self.lost = lost


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files: the authority that signed the guest's certificate, our certificate and its key."""

    authority: str
    certificate: str
    key: str

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC needs. Raises ConfigError when a file cannot be read."""
        contents = []
        for path in (self.authority, self.key, self.certificate):
            try:
                with open(path, "rb") as file:
                    contents.append(file.read())
            except OSError as error:
                raise ConfigError(f"TLS file {path}: {error.strerror}") from error
        return grpc.ssl_channel_credentials(*contents)


class Client:
    """Calls to the storaged at `address`. Close it, or use it in `with`."""

    def __init__(
        self, address: Address, *, tls: Tls | None = None, insecure: bool = False, timeout_s: float | None = None
    ) -> None:
        self.address = address
        self.answer_within_s = timeout_s if timeout_s is not None else ANSWER_WITHIN_S
        self.work_within_s = timeout_s if timeout_s is not None else WORK_WITHIN_S
        self._channel = _channel(address, tls, insecure)
        self.storage = storaged_v1_pb2_grpc.StorageStub(self._channel)
        self.maitred = vm_guest_pb2_grpc.MaitredStub(self._channel)

    def report(self) -> storaged_v1_pb2.Report:
        """Every number the daemon believes."""
        return self._call(self.storage.GetReport, storaged_v1_pb2.GetReportRequest())

    def minimum(self) -> int:
        """How small the filesystem can get."""
        return self._call(self.maitred.GetResizeBounds, common_pb2.EmptyMessage()).minimum_size

    def resize(self, size: int) -> bool:
        """Start a resize job; False when one is running already."""
        answer = self._call(self.maitred.ResizeFilesystem, vm_guest_pb2.ResizeFilesystemRequest(size=size))
        if answer.status == vm_guest_pb2.ResizeFilesystemResponse.FAILED:
            raise CallFailed("storaged refused the resize and did not say why", Kind.INTERNAL)
        return answer.status == vm_guest_pb2.ResizeFilesystemResponse.STARTED

    def start(self, size: int, *, best_effort: bool, retarget: bool) -> storaged_v1_pb2.Job:
        """Start a resize job that Maitred has no words for; the job."""
        request = storaged_v1_pb2.ResizeRequest(size_bytes=size, best_effort=best_effort, retarget=retarget)
        return self._call(self.storage.Resize, request, self.work_within_s).job

    def cancel(self) -> storaged_v1_pb2.Job:
        """Cancel the running job and wait for its end."""
        request = storaged_v1_pb2.CancelResizeRequest()
        return self._call(self.storage.CancelResize, request, self.work_within_s).job

    def balloon(self, free: int, state: vm_guest_pb2.StatefulDiskSpaceState.ValueType) -> bool:
        """Tell the host's free space as a host does; False when the balloon is not where it should be."""
        request = vm_guest_pb2.UpdateStorageBalloonRequest(state=state, free_space_bytes=free)
        return self._call(self.maitred.UpdateStorageBalloon, request).result == vm_guest_pb2.SUCCESS

    def trim(self, *, reclaim: bool) -> int:
        """Hand unused blocks back; bytes as the kernel counts."""
        request = storaged_v1_pb2.TrimRequest(reclaim_empty_chunks=reclaim)
        return self._call(self.storage.Trim, request, self.work_within_s).trimmed_bytes

    def explain(self, error: grpc.RpcError, within_s: float | None = None) -> CallFailed:
        """What went wrong, in one line."""
        code, details = _status(error)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            limit = self.answer_within_s if within_s is None else within_s
            return CallFailed(f"storaged at {self.address} did not answer within {limit:g} s", Kind.BUSY, lost=True)
        if code is grpc.StatusCode.UNAVAILABLE and details.lower().startswith(NO_CONNECTION):
            return CallFailed(f"cannot reach storaged at {self.address}: {cause(details)}", Kind.UNAVAILABLE, lost=True)
        if code is grpc.StatusCode.UNIMPLEMENTED and details.startswith("Method not found"):
            return CallFailed(f"what answers at {self.address} does not know this call", Kind.UNSUPPORTED)
        lost = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        text = details or f"storaged at {self.address} answered {code.name}"
        return CallFailed(text, Kind.UNAVAILABLE if lost else Kind.INTERNAL, lost=lost)

    def close(self) -> None:
        """Give the connection up; calls under way end."""
        self._channel.close()

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Answer], request: _Request, within_s: float | None = None
    ) -> _Answer:
        try:
            return method(request, timeout=within_s if within_s is not None else self.answer_within_s)
        except grpc.RpcError as error:
            raise self.explain(error, within_s) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _channel(address: Address, tls: Tls | None, insecure: bool) -> grpc.Channel:
    if isinstance(address, UnixAddress):
        return grpc.insecure_channel(f"unix:{address.path}", options=_OPTIONS)
    if isinstance(address, TcpAddress):
        target = f"dns:///{address.host}:{address.port}"
        if tls is not None:
            return grpc.secure_channel(target, tls.credentials(), options=_OPTIONS)
        if insecure and address.loopback:
            return grpc.insecure_channel(target, options=_OPTIONS)
        raise ConfigError(
            f"{address} needs TLS with client certificates (--tls-ca, --tls-cert, --tls-key),"
            " unless it is a loopback address and --insecure is given"
        )
    raise ConfigError(f"{address}: vsock is not built yet; use unix: or tcp:")


def _status(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Code and message; what grpc raises is a Call too, which its types do not say."""
    call: Any = error
    return call.code() or grpc.StatusCode.UNKNOWN, call.details() or ""


def cause(details: str) -> str:
    """The operating system's own words at the end of gRPC's."""
    cause = details.rpartition("last error: ")[2]
    for separator in (" error: ", "connect failed: ", "connect: ", "remote host: "):
        _, found, rest = cause.rpartition(separator)
        cause = rest if found else cause
    return cause
