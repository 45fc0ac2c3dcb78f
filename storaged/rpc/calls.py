"""What every call has: an identity in the log, a deadline, a place in the counts; and the gate that can shut."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import grpc
import grpc.aio

from storaged.config import LimitsConfig
from storaged.errors import InvalidRequest
from storaged.logs import REQUEST_ID, RPC_METHOD, request_id

log = logging.getLogger(__name__)
OURS = ("/vm_tools.Maitred/", "/storaged.v1.Storage/")
ALWAYS = ("/vm_tools.Maitred/Shutdown",)
"""Answered while the gate is shut, and whatever the load: asking twice for the same end is no error."""
ENDLESS = ("/vm_tools.Maitred/LaunchProcess",)
"""May wait for a program for as long as that runs, if the caller sets no deadline."""
BUCKETS = (0.01, 0.1, 1.0, 10.0)
"""Seconds: a read, a balloon step, a slow disk, and the host's deadline is near."""
COUNTED_FROM_START = (
    "UpdateStorageBalloon",
    "ResizeFilesystem",
    "GetResizeStatus",
    "GetResizeBounds",
    "GetAvailableSpace",
)
TIMED = ("UpdateStorageBalloon", "GetResizeStatus", "GetAvailableSpace")
"""Whose durations are kept: what hosts call all the time. A histogram for each method would be hundreds of series."""
ID_HEADER = "x-request-id"
Requests = AsyncIterator[Any]
Labels = tuple[str, str, str]
"""grpc_type, grpc_service, grpc_method."""
UNKNOWN: Labels = ("unary", "unknown", "unknown")
"""All methods that nobody has: their names are whatever the caller made up, and must not become labels."""


@dataclass(slots=True)
class Duration:
    """A histogram; `buckets` are not cumulative, the last is beyond every bound."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0


class Calls:
    """Counts of calls; plain numbers, so that a daemon without metrics carries no library for them."""

    def __init__(self) -> None:
        self.started: Counter[Labels] = Counter()
        self.handled: Counter[tuple[Labels, str]] = Counter()
        self.seconds: dict[Labels, Duration] = {}
        for method in COUNTED_FROM_START:
            labels = ("unary", "vm_tools.Maitred", method)
            self.started[labels] = 0
            self.handled[labels, "OK"] = 0
            if method in TIMED:
                self.seconds[labels] = Duration()

    def begin(self, labels: Labels) -> float:
        """A call begins; when."""
        self.started[labels] += 1
        return perf_counter()

    def end(self, labels: Labels, code: str, began: float) -> float:
        """It ended; the seconds it took."""
        self.handled[labels, code] += 1
        took = perf_counter() - began
        if labels[2] in TIMED:
            duration = self.seconds.setdefault(labels, Duration())
            duration.buckets[bisect_left(BUCKETS, took)] += 1
            duration.total += took
        return took


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The outermost layer of every call.

    To gRPC every method takes a stream, of which we read one request: on the wire that is the same, and so a call is
    let in, and its time begins, before memory is spent on what it sends, however slowly.
    """

    def __init__(self, limits: LimitsConfig, calls: Calls) -> None:
        self.limits = limits
        self.calls = calls
        self.refuse = ""
        """Why no new work is taken; empty while it is."""
        self.running = {"unary": 0, "stream": 0}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            self.calls.end(UNKNOWN, "UNIMPLEMENTED", self.calls.begin(UNKNOWN))
            return None  # gRPC answers
        _, service, name = method.split("/", 2)
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary is not None:
            run = self._unary(handler.unary_unary, method, ("unary", service, name))
            return grpc.stream_unary_rpc_method_handler(run, **codec)
        if handler.unary_stream is not None:
            stream = self._streaming(handler.unary_stream, method, ("server_stream", service, name), _only)
            return grpc.stream_stream_rpc_method_handler(stream, **codec)
        if handler.stream_stream is not None:
            stream = self._streaming(handler.stream_stream, method, ("bidi_stream", service, name), _all)
            return grpc.stream_stream_rpc_method_handler(stream, **codec)
        return handler  # nothing here takes a stream and answers once

    @contextlib.contextmanager
    def _counted(self, labels: Labels, method: str, context: Any) -> Iterator[None]:
        """Around a call: its name in the log, its place among those that run, its code and duration in the counts."""
        offered = next((value for key, value in context.invocation_metadata() or () if key == ID_HEADER), None)
        identity = request_id(offered)
        REQUEST_ID.set(identity)
        RPC_METHOD.set(method)
        context.set_trailing_metadata(((ID_HEADER, identity),))
        kind = "unary" if labels[0] == "unary" else "stream"
        self.running[kind] += 1
        began, code = self.calls.begin(labels), "UNKNOWN"
        try:
            yield
            code = _code(context)
        except (asyncio.CancelledError, GeneratorExit):
            code = _cancelled(context)
            raise
        except BaseException:
            code = _code(context, "UNKNOWN")
            raise
        finally:
            self.running[kind] -= 1
            took = self.calls.end(labels, code, began)
            log.debug("%s: %s after %.1f ms", method, code, took * 1e3)

    async def _enter(self, context: Any, method: str, kind: str, most: int) -> None:
        """Let the call in, or end it."""
        if method in ALWAYS:
            return
        if self.running[kind] > most:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{most} calls of this kind are running already; try again later"
            )
        if self.refuse and method.startswith(OURS):
            await context.abort(grpc.StatusCode.UNAVAILABLE, self.refuse)

    def _unary(self, call: Callable[..., Awaitable[Any]], method: str, labels: Labels) -> Callable[..., Any]:
        async def run(requests: Requests, context: Any) -> Any:
            with self._counted(labels, method, context):
                await self._enter(context, method, "unary", self.limits.calls)
                own = context.time_remaining() is not None or method in ENDLESS
                limit = None if own else self.limits.call_s
                watch = asyncio.timeout(limit)
                try:
                    async with watch:
                        return await call(await _only(requests), context)
                except TimeoutError:
                    if not watch.expired():
                        raise
                    too_long = f"not done within {limit:g} s; give a longer deadline"
                    return await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, too_long)

        return run

    def _streaming(
        self, call: Callable[..., Any], method: str, labels: Labels, what: Callable[[Requests], Awaitable[Any]]
    ) -> Callable[..., Any]:
        async def answers(requests: Requests, context: Any) -> AsyncIterator[Any]:
            with self._counted(labels, method, context):
                await self._enter(context, method, "stream", self.limits.streams)
                async for answer in call(await what(requests), context):
                    yield answer

        async def writes(requests: Requests, context: Any) -> None:
            with self._counted(labels, method, context):
                await self._enter(context, method, "stream", self.limits.streams)
                await call(await what(requests), context)

        return answers if inspect.isasyncgenfunction(call) else writes


async def _only(requests: Requests) -> Any:
    """The request of a call that has one."""
    async for request in requests:
        return request
    raise InvalidRequest("the request is missing")


async def _all(requests: Requests) -> Requests:
    return requests


def _code(context: Any, otherwise: str = "OK") -> str:
    code = context.code()
    if isinstance(code, int):
        code = next((item for item in grpc.StatusCode if item.value[0] == code), None)
    if code is None or (otherwise != "OK" and code is grpc.StatusCode.OK):
        return otherwise
    return str(code.name)


def _cancelled(context: Any) -> str:
    left = context.time_remaining()
    return "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
