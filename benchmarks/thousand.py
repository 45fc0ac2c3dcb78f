"""A thousand guests' agents in one process: HTTP/2 spoken by hand, so that the guests' side costs little.

A gRPC server in Python takes longer for an answer than the controller for a call; a thousand real guests have
processors of their own. Every UpdateStorageBalloon is answered with SUCCESS, every other call with UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from pathlib import Path

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING = 0, 1, 4, 6
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_STATE = 0x08
"""The first byte of an UpdateStorageBalloonRequest: field 1, a number (never NONE, so always there)."""


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _field(name: bytes, value: bytes) -> bytes:
    """A header that is not remembered (HPACK: literal without indexing, new name)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


_BEGIN = b"\x88" + _field(b"content-type", b"application/grpc")  # 0x88: `:status 200` of the static table
_OK, _UNIMPLEMENTED = _field(b"grpc-status", b"0"), _field(b"grpc-status", b"12")


class _Guest(asyncio.Protocol):
    def __init__(self) -> None:
        self._buffer = bytearray()
        self._greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(_frame(_SETTINGS, 0, 0))

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if not self._greeted:
            if len(buffer) < len(_PREFACE):
                return
            del buffer[: len(_PREFACE)]
            self._greeted = True
        answers = []
        while len(buffer) >= 9 and len(buffer) >= (end := 9 + int.from_bytes(buffer[:3])):
            kind, flags, stream = buffer[3], buffer[4], int.from_bytes(buffer[5:9])
            payload = bytes(buffer[9:end])
            del buffer[:end]
            if kind in {_SETTINGS, _PING} and not flags & _ACK:
                answers.append(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            elif kind == _DATA and flags & _END_STREAM:
                answers.append(_answer(stream, balloon=payload[5:6] == bytes([_STATE])))
        if answers:
            self._transport.write(b"".join(answers))


def _answer(stream: int, *, balloon: bool) -> bytes:
    last = _HEADERS, _END_HEADERS | _END_STREAM, stream
    if not balloon:
        return _frame(*last, _BEGIN + _UNIMPLEMENTED)
    message = _frame(_DATA, 0, stream, bytes(5))  # not compressed, 0 bytes long: SUCCESS
    return _frame(_HEADERS, _END_HEADERS, stream, _BEGIN) + message + _frame(*last, _OK)


async def serve(directory: Path, count: int) -> None:
    """Until cancelled, on `count` sockets named by their numbers."""
    loop = asyncio.get_running_loop()
    for index in range(count):
        await loop.create_unix_server(_Guest, str(directory / f"{index}.sock"))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
