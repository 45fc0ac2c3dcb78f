"""What every call passes through: errors become statuses, and no broken call harms another."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from storaged.errors import InvalidRequest, StoragedError, Unsupported
from storaged.quiet import BoundedLog, peer_of
from storaged.rpc.status import CODES

log = logging.getLogger(__name__)
LONGEST = 2000
"""Characters of a message: it travels in a header, and may quote what a caller sent."""


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Answers a StoragedError with its code and message, anything unforeseen with INTERNAL, and logs the latter.

    Messages are decoded and encoded here too, so that a broken one is no different from a broken call.
    """

    def __init__(self) -> None:
        self._refusals = BoundedLog(log, logging.INFO)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        decode, encode = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:
            call = handler.unary_unary
            if not inspect.iscoroutinefunction(call):  # what the generated code has for a method nobody wrote
                call = _unimplemented

            async def unary(data: bytes, context: Any) -> Any:
                try:
                    return encode(await call(_decoded(decode, data), context))
                except (Exception, SystemExit, GeneratorExit) as error:  # noqa: BLE001  # the boundary: whatever it is, the caller gets a status
                    await self._abort(context, method, error)

            return grpc.unary_unary_rpc_method_handler(unary)
        if handler.unary_stream is not None and inspect.isasyncgenfunction(handler.unary_stream):
            stream: Any = handler.unary_stream

            async def streaming(data: bytes, context: Any) -> AsyncIterator[Any]:
                try:
                    async for answer in stream(_decoded(decode, data), context):
                        yield encode(answer)
                except (Exception, SystemExit) as error:  # noqa: BLE001  # as above
                    await self._abort(context, method, error)

            return grpc.unary_stream_rpc_method_handler(streaming)
        return handler  # a library's own: it knows its statuses

    async def _abort(self, context: Any, method: str, error: BaseException) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, StoragedError):
            message = error.message if len(error.message) <= LONGEST else f"{error.message[:LONGEST]} ..."
            peer = peer_of(context.peer())
            self._refusals.note(peer, f"{method} {error.kind.value}", f"{method} refused: {message}")
            await context.abort(CODES[error.kind], message)
        if isinstance(error, TimeoutError):
            log.warning("%s: the disk did not answer in time", method)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the disk did not answer in time")
        log.error("%s failed", method, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}); see the daemon's log")


def _decoded(decode: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return decode(data)
    except Exception as error:
        raise InvalidRequest(f"the request is not the message of this method: {error}") from error


async def _unimplemented(_request: Any, _context: Any) -> Any:
    raise Unsupported("this daemon does not serve this method")
