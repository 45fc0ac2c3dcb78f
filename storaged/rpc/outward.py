"""The other direction: a gRPC client reaches AF_VSOCK, or a monitor's socket, through a unix socket of ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from storaged.addresses import Address, HybridAddress, TcpAddress, UnixAddress, VsockAddress
from storaged.rpc.acceptor import Acceptor
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
        self._acceptor: Acceptor | None = None
        self._carrying: dict[asyncio.Task[None], socket.socket] = {}

    def open(self, path: str) -> None:
        """Serve `path`. Raises OSError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(path)
            listener.listen()
        except BaseException:
            listener.close()
            raise
        self._acceptor = Acceptor(listener, self._begin)

    def _begin(self, near: socket.socket, _: object) -> None:
        task = asyncio.get_running_loop().create_task(self._carry(near))
        self._carrying[task] = near
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        near = self._carrying.pop(task)
        if task.cancelled():  # perhaps before it began, and then nobody else closes it
            near.close()

    async def _carry(self, near: socket.socket) -> None:
        ends: list[asyncio.StreamWriter] = []
        try:
            reader, writer = await asyncio.open_connection(sock=near, limit=BUFFER)
            ends.append(writer)
            far_reader, far = await asyncio.open_connection(sock=await self._connect(), limit=BUFFER)
            ends.append(far)
            await asyncio.gather(_pump(reader, far), _pump(far_reader, writer))
        except (OSError, TimeoutError) as error:
            log.debug("no way out: %s", error)
        except asyncio.CancelledError:
            for one in ends:
                one.transport.abort()  # nobody waits for what is not sent yet
            raise
        finally:
            for one in ends:
                one.close()

    async def close(self) -> None:
        """End everything."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        tasks = list(self._carrying)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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
            way.open(private.socket("out"))
            yield f"unix:{private.socket('out')}"
        finally:
            await way.close()
    finally:
        private.remove()
