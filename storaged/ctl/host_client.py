"""The host's own service as plain calls, and its reports as a queue that also carries Ctrl-C."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from storaged.addresses import Address, TcpAddress, UnixAddress
from storaged.ctl.client import BROKEN, NO_CONNECTION, CallFailed, cause
from storaged.ctl.feed import TRY_AGAIN_S, TWICE_S, Gone, Interrupted, Lost
from storaged.errors import ConfigError, Kind
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc as rpc

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_Answer = TypeVar("_Answer")
ANSWER_WITHIN_S = 20.0
SILENCE_S = 10.0
"""The host looks at its pools every second: one that says nothing for so long is not well."""
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
]

Event = pb.Report | Lost | Gone | Interrupted


class HostClient:
    """Calls to the storaged-host at `address`. Close it, or use it in `with`."""

    def __init__(self, address: Address, timeout_s: float | None = None) -> None:
        self.address = address
        self.answer_within_s = timeout_s if timeout_s is not None else ANSWER_WITHIN_S
        if isinstance(address, UnixAddress):
            target = f"unix:{address.path}"
        elif isinstance(address, TcpAddress) and address.loopback:
            target = f"dns:///{address.host}:{address.port}"
        else:
            raise ConfigError(f"{address}: storaged-host is asked at a unix socket, or a loopback address")
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self.host = rpc.HostStub(self._channel)

    def guests(self, pool: str = "") -> list[pb.Guest]:
        """All guests, sorted by name."""
        return list(self._call(self.host.ListGuests, pb.ListGuestsRequest(pool=pool)).guests)

    def guest(self, name: str) -> pb.Guest:
        """One guest. Raises CallFailed when there is none of that name."""
        guests = self.guests()
        for guest in guests:
            if guest.name == name:
                return guest
        known = ", ".join(guest.name for guest in guests) or "none"
        raise CallFailed(f"no guest is called {name!r}; known: {known}", Kind.PRECONDITION)

    def pool(self, name: str) -> pb.Pool:
        """One pool; the only one needs no name."""
        return self._call(self.host.GetPool, pb.GetPoolRequest(name=name))

    def report(self) -> pb.Report:
        """What a watch says first."""
        call: Any = self.host.Watch(pb.WatchRequest(history_once=True), timeout=self.answer_within_s)
        try:
            report: pb.Report = next(call)
        except grpc.RpcError as error:
            raise self.explain(error) from error
        call.cancel()
        return report

    def resize(self, name: str, size: int, *, allow_overcommit: bool = False) -> pb.Resize:
        """Begin a resize."""
        request = pb.ResizeRequest(guest=name, size_bytes=size, allow_overcommit=allow_overcommit)
        return self._call(self.host.Resize, request).resize

    def cancel(self, name: str = "", resize: str = "") -> pb.Resize:
        """Ask the guest's resize to stop, if it is the one with this id; either may be empty."""
        request = pb.CancelResizeRequest(id=resize, guest=name)
        return self._call(self.host.CancelResize, request).resize

    def unfence(self, name: str) -> pb.Guest:
        """Let a guest that exceeded its grant have a share again."""
        return self._call(self.host.LiftFence, pb.LiftFenceRequest(guest=name)).guest

    def console_link(self) -> pb.GetConsoleLinkResponse:
        """A link that signs a browser in to the console."""
        return self._call(self.host.GetConsoleLink, pb.GetConsoleLinkRequest())

    def explain(self, error: grpc.RpcError) -> CallFailed:
        """What went wrong, in one line."""
        call: Any = error
        code, details = call.code() or grpc.StatusCode.UNKNOWN, call.details() or ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            text = f"storaged-host at {self.address} did not answer within {self.answer_within_s:g} s"
            return CallFailed(text, Kind.BUSY, lost=True)
        if code is grpc.StatusCode.UNAVAILABLE and details.lower().startswith(NO_CONNECTION):
            text = (
                f"cannot reach storaged-host at {self.address} ({cause(details)}); is it running, and may you open it?"
            )
            return CallFailed(text, Kind.UNAVAILABLE, lost=True)
        broken = not details or details.lower().startswith(BROKEN)  # else it is storaged-host's own word
        lost = code is grpc.StatusCode.CANCELLED or (code is grpc.StatusCode.UNAVAILABLE and broken)
        text = details or f"storaged-host at {self.address} answered {code.name}"
        return CallFailed(text, Kind.UNAVAILABLE if lost else Kind.INTERNAL, lost=lost)

    def close(self) -> None:
        """Give the connection up; calls under way end."""
        self._channel.close()

    def _call(self, method: Callable[..., _Answer], request: Any) -> _Answer:
        try:
            return method(request, timeout=self.answer_within_s)
        except grpc.RpcError as error:
            raise self.explain(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HostFeed:
    """Use it in `with`, on the main thread; then take events with `next`.

    The first `patience` times Ctrl-C is an event; after that it is a KeyboardInterrupt, as ever.
    """

    def __init__(self, client: HostClient, *, interval_s: float = 0.0, patience: int = 1) -> None:
        self._client = client
        self._interval_s = interval_s
        self._patience = patience
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._call: Any = None
        self._interrupted_at = 0.0
        self._silent = False
        self._thread = threading.Thread(target=self._read, name="watch", daemon=True)
        self._before: Any = None

    def next(self) -> Event:
        """The next event; waits for it."""
        while True:
            try:
                event = self._events.get(timeout=max(SILENCE_S, 2 * self._interval_s))
            except queue.Empty:
                if self._silent:
                    continue
                event = Lost()
            self._silent = isinstance(event, Lost)
            return event

    def _read(self) -> None:
        lost_at: float | None = None
        while not self._closed.is_set():
            reason = "storaged-host ended the stream"
            try:
                request = pb.WatchRequest(min_interval_s=self._interval_s, history_once=True)
                self._call = self._client.host.Watch(request)
                for report in self._call:
                    lost_at = None
                    self._events.put(report)
            except grpc.RpcError as error:
                failed = self._client.explain(error)
                if not failed.lost and not self._closed.is_set() and lost_at is None:
                    lost_at = time.monotonic()  # it may be stopping; what it says next time counts
                    self._events.put(Lost())
                reason = failed.message
            if lost_at is None:
                lost_at = time.monotonic()
                self._events.put(Lost())
            elif time.monotonic() - lost_at > self._client.answer_within_s:
                self._events.put(Gone(f"{reason}; gave up after {self._client.answer_within_s:g} s"))
                return
            self._closed.wait(TRY_AGAIN_S)

    def _interrupt(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._interrupted_at < TWICE_S:
            return
        self._interrupted_at = now
        if self._patience <= 0:
            raise KeyboardInterrupt
        self._patience -= 1
        self._events.put(Interrupted())

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        for _ in range(40):
            if self._call is not None:
                self._call.cancel()
            self._thread.join(0.05)
            if not self._thread.is_alive():
                break
        signal.signal(signal.SIGINT, self._before)
