"""The peer: a bare grpc.aio server whose every method answers an empty message. Argument: the address."""

from __future__ import annotations

import asyncio
import signal
import sys

import grpc
import grpc.aio


class Empty(grpc.GenericRpcHandler):
    """Answers anything with nothing."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:  # noqa: ARG002
        return grpc.unary_unary_rpc_method_handler(answer)


async def answer(request: bytes, context: object) -> bytes:  # noqa: ARG001
    """No bytes: every field of whatever message it is has its default."""
    return b""


async def main() -> None:
    """Serve until SIGTERM."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Empty(),))
    server.add_insecure_port(sys.argv[1])
    await server.start()
    await stopping.wait()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
