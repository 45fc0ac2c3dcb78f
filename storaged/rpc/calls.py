"""What every call has: an identity in the log, a deadline, a place in the counts; and the gate that can shut."""

from __future__ import annotations

import asyncio
import inspect
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import grpc
import grpc.aio

from storaged.logs import REQUEST_ID, request_id

OURS = ("/vm_tools.Maitred/", "/storaged.v1.Storage/")
ALWAYS = ("/vm_tools.Maitred/Shutdown",)
"""Answered while the gate is shut: asking twice for the same end is no error."""
BUCKETS = (0.01, 0.1, 1.0, 10.0)
"""Seconds: a read, a balloon step, a slow disk, and the host's deadline is near."""
COUNTED_FROM_START = (
    "UpdateStorageBalloon",
    "ResizeFilesystem",
    "GetResizeStatus",
    "GetResizeBounds",
    "GetAvailableSpace",
)
ID_HEADER = "x-request-id"


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What one caller may cost."""

    call_s: float = field(
        default=60.0,
        metadata={"help": "Deadline of a unary call whose caller gave none.", "unit": "seconds", "least": 1.0},
    )
    calls: int = field(default=512, metadata={"help": "Calls that run at once.", "least": 8, "most": 65536})
    keepalive_s: float = field(
        default=60.0, metadata={"help": "A silent connection is pinged after this.", "unit": "seconds", "least": 1.0}
    )
    keepalive_wait_s: float = field(
        default=20.0,
        metadata={"help": "It ends when the ping is not answered within this.", "unit": "seconds", "least": 1.0},
    )
    drain_s: float = field(
        default=5.0, metadata={"help": "Running calls may finish within this at the end.", "unit": "seconds"}
    )


Labels = tuple[str, str, str]
"""grpc_type, grpc_service, grpc_method."""


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

    def begin(self, labels: Labels) -> float:
        """A call begins; when."""
        self.started[labels] += 1
        return perf_counter()

    def end(self, labels: Labels, code: str, began: float) -> None:
        """It ended."""
        self.handled[labels, code] += 1
        took = perf_counter() - began
        duration = self.seconds.setdefault(labels, Duration())
        duration.buckets[bisect_left(BUCKETS, took)] += 1
        duration.total += took


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The outermost layer of every call."""

    def __init__(self, limits: LimitsConfig, calls: Calls) -> None:
        self.limits = limits
        self.calls = calls
        self.refuse = ""
        """Why no new work is taken; empty while it is."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED; names somebody made up are not counted
        method = handler_call_details.method
        _, service, name = method.split("/", 2)
        if handler.unary_unary is not None and inspect.iscoroutinefunction(handler.unary_unary):
            labels = ("unary", service, name)
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, method, labels),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None and method.startswith(OURS):
            labels = ("server_stream", service, name)
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(handler.unary_stream, method, labels),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return handler

    async def _enter(self, context: Any, method: str) -> None:
        offered = next((value for key, value in context.invocation_metadata() or () if key == ID_HEADER), None)
        identity = request_id(offered)
        REQUEST_ID.set(identity)
        context.set_trailing_metadata(((ID_HEADER, identity),))
        if self.refuse and method.startswith(OURS) and method not in ALWAYS:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self.refuse, ((ID_HEADER, identity),))

    def _unary(self, call: Callable[..., Awaitable[Any]], method: str, labels: Labels) -> Callable[..., Any]:
        async def run(request: Any, context: Any) -> Any:
            began, code = self.calls.begin(labels), "UNKNOWN"
            try:
                await self._enter(context, method)
                limit = self.limits.call_s if context.time_remaining() is None else None
                try:
                    async with asyncio.timeout(limit) as watch:
                        answer = await call(request, context)
                except TimeoutError:
                    if not watch.expired():
                        raise
                    await context.abort(
                        grpc.StatusCode.DEADLINE_EXCEEDED, f"not done within {limit:g} s; give a longer deadline"
                    )
                code = _code(context)
                return answer
            except asyncio.CancelledError:
                code = _cancelled(context)
                raise
            except BaseException:
                code = _code(context, "UNKNOWN")
                raise
            finally:
                self.calls.end(labels, code, began)

        return run

    def _streaming(self, call: Callable[..., Any], method: str, labels: Labels) -> Callable[..., Any]:
        async def run(request: Any, context: Any) -> AsyncIterator[Any]:
            began, code = self.calls.begin(labels), "CANCELLED"
            try:
                await self._enter(context, method)
                async for answer in call(request, context):
                    yield answer
                code = _code(context)
            except (asyncio.CancelledError, GeneratorExit):
                code = _cancelled(context)
                raise
            except BaseException:
                code = _code(context, "UNKNOWN")
                raise
            finally:
                self.calls.end(labels, code, began)

        return run


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
