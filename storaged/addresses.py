"""Addresses as people write them: `unix:/path`, `tcp:HOST:PORT`, `vsock:CID:PORT`, and `hybrid:/path:PORT`."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from storaged.errors import ConfigError

LONGEST_UNIX_PATH = 107
"""sun_path of sockaddr_un less its final NUL (unix(7))."""
HYBRID = "hybrid:"
ANY_CID = 0xFFFFFFFF
"""VMADDR_CID_ANY (vsock(7))."""


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the filesystem."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host and a port; IPv6 hosts are written in brackets."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """True when nothing outside this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"tcp:{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A context id and a port; an empty id means any, for listening."""

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock:{'' if self.cid == ANY_CID else self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class HybridAddress:
    """A vsock port of one guest, reached through the unix socket that its machine monitor serves."""

    path: str
    port: int

    def __str__(self) -> str:
        return f"hybrid:{self.path}:{self.port}"


Address = UnixAddress | TcpAddress | VsockAddress
GuestAddress = Address | HybridAddress
"""Where a host finds a guest."""


def parse_address(text: str) -> Address:
    """The address `text` names. Raises ConfigError that says what is accepted."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "unix" and rest:
            path = os.path.abspath(rest)
            if len(os.fsencode(path)) > LONGEST_UNIX_PATH:
                raise ConfigError(f"address {text!r}: a socket's path has at most {LONGEST_UNIX_PATH} bytes")
            if "\0" in path:
                raise ConfigError(f"address {text!r}: a path has no NUL byte")
            return UnixAddress(path)
        host, separator, port = rest.rpartition(":")
        if kind == "tcp" and separator and host:
            return TcpAddress(host, _port(port, 65535))
        if kind == "vsock" and separator:
            return VsockAddress(_port(host, ANY_CID) if host else ANY_CID, _port(port, ANY_CID))
    except ValueError:
        pass
    raise ConfigError(f"address {text!r} is not unix:/path, tcp:HOST:PORT or vsock:CID:PORT")


def parse_guest_address(text: str) -> GuestAddress:
    """As `parse_address`, for where a host finds a guest."""
    kind, _, rest = text.partition(":")
    if kind != "hybrid":
        try:
            return parse_address(text)
        except ConfigError as error:
            raise ConfigError(f"{error.message}, nor hybrid:/path:PORT") from None
    path, _, port = rest.rpartition(":")
    try:
        if not path.startswith("/"):
            raise ValueError(path)
        number = _port(port, ANY_CID - 1)
    except ValueError:
        raise ConfigError(f"address {text!r} is not hybrid:/path:PORT") from None
    socket = parse_address(f"unix:{path}")
    assert isinstance(socket, UnixAddress)
    return HybridAddress(socket.path, number)


def _port(text: str, most: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > most:
        raise ValueError(text)
    return int(text)
