"""What every call passes through: errors become statuses, and no broken call harms another."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from storaged.errors import StoragedError
from storaged.rpc.status import CODES

log = logging.getLogger(__name__)


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Answers a StoragedError with its code and message, anything unforeseen with INTERNAL, and logs the latter."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        if handler.unary_unary is not None:
            call = handler.unary_unary
            if not inspect.iscoroutinefunction(call):
                return handler  # a library's own (health): it knows its statuses

            async def unary(request: Any, context: Any) -> Any:
                try:
                    return await call(request, context)
                except Exception as error:  # noqa: BLE001  # the boundary: whatever it is, the caller gets a status
                    await _abort(context, method, error)

            return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)
        if handler.unary_stream is not None and method.startswith("/storaged."):
            stream: Any = handler.unary_stream

            async def streaming(request: Any, context: Any) -> AsyncIterator[Any]:
                try:
                    async for answer in stream(request, context):
                        yield answer
                except Exception as error:  # noqa: BLE001  # as above
                    await _abort(context, method, error)

            return grpc.unary_stream_rpc_method_handler(
                streaming, handler.request_deserializer, handler.response_serializer
            )
        return handler


async def _abort(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, StoragedError):
        log.info("%s refused: %s", method, error.message)
        await context.abort(CODES[error.kind], error.message)
    if isinstance(error, TimeoutError):
        log.warning("%s: the disk did not answer in time", method)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the disk did not answer in time")
    log.error("%s failed", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}); see the daemon's log")
