"""The other direction: a gRPC client reaches AF_VSOCK, or a monitor's socket, through a unix socket of ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from storaged.addresses import Address, HybridAddress, TcpAddress, UnixAddress, VsockAddress
from storaged.rpc.private import PrivateDirectory

log = logging.getLogger(__name__)
BUFFER = 64 << 10
"""Bytes that may wait for a slow reader."""


Connect = Callable[[], Awaitable[socket.socket]]
GREETING_S, LONGEST_GREETING = 5.0, 32
"""A monitor answers at once, as in `OK 1073741824`, or closes the connection when nobody listens in the guest."""


def to_vsock(address: VsockAddress) -> Connect:
    """How to connect to `address`."""

    async def connect() -> socket.socket:
        outside = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(outside, (address.cid, address.port))
        except BaseException:
            outside.close()
            raise
        return outside

    return connect


def to_hybrid(address: HybridAddress) -> Connect:
    """How to connect to `address`: a word to the monitor and its answer, then the guest's port."""

    async def connect() -> socket.socket:
        loop = asyncio.get_running_loop()
        outside = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            async with asyncio.timeout(GREETING_S):
                await loop.sock_connect(outside, address.path)
                await loop.sock_sendall(outside, f"CONNECT {address.port}\n".encode())
                answer = b""
                # A byte at a time: what follows is the guest's.
                while not answer.endswith(b"\n") and len(answer) < LONGEST_GREETING:
                    if not (more := await loop.sock_recv(outside, 1)):
                        break
                    answer += more
            if not (answer.startswith(b"OK ") and answer.endswith(b"\n")):
                raise ConnectionRefusedError(f"{address}: the monitor answered {answer!r}")
        except BaseException:
            outside.close()
            raise
        return outside

    return connect


class Outward:
    """A unix socket whose connections go out by `connect`: for a gRPC client."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._server: asyncio.Server | None = None
        self._starting: asyncio.Task[None] | None = None
        self._carrying: set[asyncio.Task[None]] = set()

    async def start(self, path: str) -> None:
        """Serve `path`."""
        self._server = await asyncio.start_unix_server(self._begin, path, limit=BUFFER)

    def open(self, path: str) -> None:
        """Serve `path` soon; who connects before is not refused."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(path)
            listener.listen()
        except BaseException:
            listener.close()
            raise
        self._starting = asyncio.get_running_loop().create_task(self._adopt(listener))

    async def _adopt(self, listener: socket.socket) -> None:
        try:
            self._server = await asyncio.start_unix_server(self._begin, sock=listener, limit=BUFFER)
        except BaseException:
            listener.close()
            raise

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._carry(reader, writer))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far: asyncio.StreamWriter | None = None
        try:
            far_reader, far = await asyncio.open_connection(sock=await self._connect(), limit=BUFFER)
            await asyncio.gather(_pump(reader, far), _pump(far_reader, writer))
        except (OSError, TimeoutError) as error:
            log.debug("no way out: %s", error)
        except asyncio.CancelledError:
            for one in (writer, far):
                if one is not None:
                    one.transport.abort()  # nobody waits for what is not sent yet
            raise
        finally:
            for one in (writer, far):
                if one is not None:
                    one.close()

    async def close(self) -> None:
        """End everything."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        for task in list(self._carrying):
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the loop's next round


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(BUFFER):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


@contextlib.asynccontextmanager
async def reach(address: Address) -> AsyncIterator[str]:
    """A gRPC target that leads to `address`, for as long as the block lasts."""
    if isinstance(address, UnixAddress):
        yield f"unix:{address.path}"
        return
    if isinstance(address, TcpAddress):
        yield f"{address.host}:{address.port}"
        return
    private = PrivateDirectory()
    try:
        way = Outward(to_vsock(address))
        try:
            await way.start(private.socket("out"))
            yield f"unix:{private.socket('out')}"
        finally:
            await way.close()
    finally:
        private.remove()
