"""One gRPC call with an empty message, spoken by hand over a bare unix socket.

A client library takes longer to connect (and waits longer before it tries again) than a server takes to start.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0x0, 0x1, 0x4
_END_STREAM, _END_HEADERS, _ACK = 0x1, 0x4, 0x1
_STREAM = 1
_EMPTY_MESSAGE = bytes(5)  # not compressed, 0 bytes long
ANSWERS_WITHIN_S = 5.0


def connect(path: Path) -> socket.socket | None:
    """A connection to `path`, or None while nobody listens there."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        return None
    connection.settimeout(ANSWERS_WITHIN_S)
    return connection


def call(connection: socket.socket, method: str) -> bool:
    """Call `method`; True when it was answered with a message, False when it was refused."""
    headers = b"".join(
        _header(name, value)
        for name, value in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        )
    )
    try:
        connection.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, b"")
            + _frame(_HEADERS, _END_HEADERS, _STREAM, headers)
            + _frame(_DATA, _END_STREAM, _STREAM, _EMPTY_MESSAGE)
        )
        with connection.makefile("rb") as stream:
            while head := stream.read(9):
                length = int.from_bytes(head[:3], "big")
                kind, flags, number = struct.unpack(">BBL", head[3:])
                stream.read(length)
                if number == _STREAM and kind == _DATA and length >= len(_EMPTY_MESSAGE):
                    return True
                if number == _STREAM and flags & _END_STREAM:
                    return False
                if kind == _SETTINGS and not flags & _ACK:
                    connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
    except OSError:
        pass
    return False


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBL", kind, flags, stream) + payload


def _header(name: str, value: str) -> bytes:
    """A literal header field that is not indexed (RFC 7541, 6.2.2); both strings are shorter than 127 bytes."""
    return bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
