"""One guest's agent, called over gRPC: any `vm_tools.Maitred`, and more of it where it is a storaged.

Every call has a deadline; nothing here waits for anybody else's guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

# gRPC would write its own view of every refused connection to stderr.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from storaged.addresses import GuestAddress, HybridAddress, TcpAddress, UnixAddress, VsockAddress
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.host.config import Tls
from storaged.host.leases import Answer
from storaged.host.levels import Level
from storaged.rpc.bound import read_bound
from storaged.rpc.outward import Connect, Outward, to_hybrid, to_vsock
from storaged.rpc.private import PrivateDirectory
from storaged.rpc.proto import common_pb2, storaged_v1_pb2, storaged_v1_pb2_grpc, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.units import GIB, MAX_SIZE, MIB

log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

HELD_BACK = GIB
"""What a guest subtracts by itself from the number that it is told."""
WATCH_INTERVAL_S = 1.0
PLEA_S = 1.0
ANSWER_S, WORK_S = 20.0, 600.0
"""For a plain answer, and for the end of a job that was cancelled: its last step takes its time."""
AGAIN_FIRST_S, AGAIN_MOST_S = 1.0, 30.0
TELL_EVERY_S = 2.0
"""Less than a guest has to explain what exceeds its grant (`Sharing.overrun_s`)."""
TELL_POTENTIAL = 4 * MIB
"""A potential that changes by less changes nothing."""
BOUNDS_FIRST_S, BOUNDS_EVERY_S = 2.0, 60.0
_NEVER_SENT = ("failed to connect to all addresses", "connections to all backends failing")
_STATE = {
    Level.NORMAL: vm_guest_pb2.DISK_NORMAL,
    Level.LOW: vm_guest_pb2.DISK_LOW,
    Level.CRITICAL: vm_guest_pb2.DISK_CRITICAL,
}
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a guest is never reached through the web's proxy
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 5000),
    ("grpc.max_receive_message_length", 1 << 20),  # a guest is not trusted to be brief
    ("grpc.http2.bdp_probe", 0),  # a ping with every answer, to measure a bandwidth that nobody wants to know
    ("grpc.enable_retries", 0),  # whoever calls tries again, and knows what became of the first try
]


class NotTold(StoragedError):
    """A guest did not take its grant. `certain`: it surely never saw it."""

    kind = Kind.UNAVAILABLE

    def __init__(self, message: str, *, certain: bool = False) -> None:
        super().__init__(message)
        self.certain = certain


class Lost(StoragedError):
    """Nobody answered: what the guest did with the call, and whether it saw it, is not known."""

    kind = Kind.UNAVAILABLE


class Refused(StoragedError):
    """The guest answered that it does not do it."""

    kind = Kind.PRECONDITION


@dataclass(frozen=True, slots=True)
class ResizeStatus:
    """What GetResizeStatus says."""

    running: bool
    current: int
    target: int


class GuestClient:
    """The agent of the guest `name`. `report` is the newest that a storaged told; None for any other agent.

    `reported_at`: when it came, monotonic seconds; it stays when the report is dropped because nobody answers.
    """

    def __init__(self, name: str, address: GuestAddress, tls: Tls | None = None, *, trusted: bool = False) -> None:
        self.name = name
        self._trusted = trusted  # its SUCCESS covers what is preallocated, though it does not say so
        self.report: storaged_v1_pb2.Report | None = None
        self.reported_at: float | None = None
        self.plain = False  # known to be no storaged
        self._way = _way(address)
        self._channel = _channel(address, tls, self._way)
        self._maitred = vm_guest_pb2_grpc.MaitredStub(self._channel)
        self._storage = storaged_v1_pb2_grpc.StorageStub(self._channel)

    async def set_available(self, size: int, level: Level, within_s: float) -> tuple[Answer, str]:
        """Let applications in the guest write `size` bytes; what it answers, and why it did not get there or empty.

        Raises NotTold, also when it did not get there and does not say where it is.
        """
        request = vm_guest_pb2.UpdateStorageBalloonRequest(state=_STATE[level], free_space_bytes=size + HELD_BACK)
        call = self._maitred.UpdateStorageBalloon(request, timeout=within_s)
        try:
            answer = await call
            told = read_bound(await call.trailing_metadata(), MAX_SIZE)
        except grpc.aio.AioRpcError as error:
            raise _not_told(error) from None
        failed = answer.result != vm_guest_pb2.SUCCESS
        if told is None:
            if failed:
                raise NotTold("its balloon did not get there")
            return Answer(size, proven=self._trusted), ""
        why = (told.reason or "its balloon did not get there") if failed else ""
        return Answer(max(told.may_write, size), told.potential, told.sequence), why

    async def watch(
        self,
        changed: Callable[[], None],
        lost: Callable[[], None],
        asked: Callable[[int], None],
        potential: Callable[[int, int], None],
    ) -> None:
        """Keep `report` up to date for as long as this runs; returns when the agent is no storaged.

        `potential`: called with the bytes that the guest holds and can still take, and the sequence of the report,
        when they change. `asked`: called with the bytes of room that the guest pleads for, at most once in PLEA_S.
        """
        beside = [asyncio.create_task(self._ask_bounds(changed)), asyncio.create_task(self._hear_pleas(asked))]
        try:
            await self._watch(changed, lost, potential)
        finally:
            for task in beside:
                task.cancel()

    async def _hear_pleas(self, asked: Callable[[int], None]) -> None:
        heard_at, wait_s = -math.inf, AGAIN_FIRST_S
        while True:
            if self.report is not None:  # else it is no storaged, or away: `_watch` finds out
                try:
                    async for plea in self._storage.AskRoom(storaged_v1_pb2.AskRoomRequest()):
                        wait_s = AGAIN_FIRST_S
                        if (now := time.monotonic()) >= heard_at + PLEA_S:  # a guest is not trusted to be modest
                            heard_at = now
                            asked(min(plea.size_bytes, MAX_SIZE))
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        return  # an older storaged
                wait_s = min(2 * wait_s, AGAIN_MOST_S)
            await asyncio.sleep(wait_s)

    async def _ask_bounds(self, changed: Callable[[], None]) -> None:
        """How small it can get is reckoned by a guest only when it is asked, so it is asked now and then."""
        await asyncio.sleep(BOUNDS_FIRST_S)
        while True:
            if self.report is not None:
                with contextlib.suppress(StoragedError):
                    report = await self.fresh_report()
                    if report is not None and self.report is not None:
                        self.report, self.reported_at = report, time.monotonic()
                        changed()
            known = self.report is not None and self.report.HasField("bounds")
            await asyncio.sleep(BOUNDS_EVERY_S * random.uniform(0.8, 1.2) if known else BOUNDS_FIRST_S)  # noqa: S311

    async def _watch(
        self, changed: Callable[[], None], lost: Callable[[], None], potential: Callable[[int, int], None]
    ) -> None:
        wait_s = AGAIN_FIRST_S
        last = told = 0
        told_at = -math.inf
        while True:
            try:
                request = storaged_v1_pb2.WatchRequest(min_interval_s=WATCH_INTERVAL_S)
                async for report in self._storage.Watch(request):
                    self.report, self.reported_at = report, (at := time.monotonic())
                    wait_s = AGAIN_FIRST_S
                    # A grow opens its room for a moment, until the balloon takes it: what two reports say counts.
                    last, now = report.balloon.potential_bytes, min(report.balloon.potential_bytes, last)
                    # Again now and then: while a grant is under way the ledger takes none.
                    if abs(now - told) >= TELL_POTENTIAL or at >= told_at + TELL_EVERY_S:
                        told, told_at = now, at
                        potential(min(now, MAX_SIZE), report.sequence)
                    changed()
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    log.info("%s is no storaged: it is told by UpdateStorageBalloon alone", self.name)
                    self.plain = True
                    return
            if self.report is not None:
                self.report = None
                lost()
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, AGAIN_MOST_S)

    async def resize_status(self) -> ResizeStatus:
        """Where the guest's own resize is. Raises Lost, Refused, as all that follows."""
        answer = await _asked(self._maitred.GetResizeStatus(common_pb2.EmptyMessage(), timeout=ANSWER_S))
        return ResizeStatus(answer.resize_in_progress, answer.current_size, answer.target_size)

    async def resize(self, size: int) -> bool:
        """Begin to resize the guest's filesystem; False when a resize is under way already."""
        request = vm_guest_pb2.ResizeFilesystemRequest(size=size)
        answer = await _asked(self._maitred.ResizeFilesystem(request, timeout=ANSWER_S))
        if answer.status == vm_guest_pb2.ResizeFilesystemResponse.FAILED:
            raise Refused("the guest does not resize its filesystem, and does not say why")
        return answer.status == vm_guest_pb2.ResizeFilesystemResponse.STARTED

    async def cancel_resize(self) -> None:
        """Have the guest stop its resize; it has stopped when this returns."""
        await _asked(self._storage.CancelResize(storaged_v1_pb2.CancelResizeRequest(), timeout=WORK_S))

    async def minimum(self) -> int:
        """How small the guest's filesystem can get; 0 when it does not know."""
        return (await _asked(self._maitred.GetResizeBounds(common_pb2.EmptyMessage(), timeout=ANSWER_S))).minimum_size

    async def fresh_report(self) -> storaged_v1_pb2.Report | None:
        """What a storaged reports now; None from any other agent."""
        if self.plain:
            return None
        try:
            return await _asked(self._storage.GetReport(storaged_v1_pb2.GetReportRequest(), timeout=ANSWER_S))
        except Refused as refused:
            if refused.kind is Kind.UNSUPPORTED:
                return None
            raise

    async def close(self) -> None:
        """End all calls."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._channel.close()
        if self._way is not None:
            await self._way.close()


_LOST = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
}
_KINDS = {
    grpc.StatusCode.UNIMPLEMENTED: Kind.UNSUPPORTED,
    grpc.StatusCode.INVALID_ARGUMENT: Kind.INVALID,
    grpc.StatusCode.OUT_OF_RANGE: Kind.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED: Kind.BUSY,
}


async def _asked(call: Awaitable[_Answer]) -> _Answer:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        details = (error.details() or "")[:500]
        if error.code() in _LOST:
            raise Lost(f"the guest does not answer ({error.code().name})") from None
        raise Refused(f"the guest refuses: {details or error.code().name}", _KINDS.get(error.code())) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Lost("the guest's machine has ended") from None  # the channel was closed under the call


def _not_told(error: grpc.aio.AioRpcError) -> NotTold:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return NotTold("it did not answer in time")
    # Only a call that found no connection was surely never sent; a lost connection may have carried it.
    certain = code is grpc.StatusCode.UNAVAILABLE and details.startswith(_NEVER_SENT)
    return NotTold("nobody answers there" if certain else f"{code.name}: {details[:200]}", certain=certain)


def _channel(address: GuestAddress, tls: Tls | None, way: Way | None) -> grpc.aio.Channel:
    if way is not None:
        return grpc.aio.insecure_channel(way.target, options=_OPTIONS)
    if isinstance(address, UnixAddress):
        return grpc.aio.insecure_channel(str(address), options=_OPTIONS)
    assert isinstance(address, TcpAddress)
    target = f"{address.host}:{address.port}"
    if tls is not None and tls.key:
        return grpc.aio.secure_channel(target, _credentials(tls), options=_OPTIONS)
    if address.loopback:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    raise ConfigError(f"{address} needs [tls] with authority, certificate and key: it is not a loopback address")


class Way:
    """To an address that gRPC cannot reach: a socket of our own, whose connections are carried there."""

    def __init__(self, connect: Connect) -> None:
        self._private = PrivateDirectory()
        self._outward = Outward(connect)
        path = self._private.socket("out")
        self._outward.open(path)
        self.target = f"unix:{path}"

    async def close(self) -> None:
        """End all connections."""
        try:
            await self._outward.close()
        finally:
            self._private.remove()


def _way(address: GuestAddress) -> Way | None:
    if isinstance(address, VsockAddress):
        return Way(to_vsock(address))
    return Way(to_hybrid(address)) if isinstance(address, HybridAddress) else None


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    contents = []
    for path in (tls.authority, tls.key, tls.certificate):
        try:
            with open(path, "rb") as file:
                contents.append(file.read())
        except OSError as error:
            raise ConfigError(f"TLS file {path}: {error.strerror}") from error
    return grpc.ssl_channel_credentials(*contents)
