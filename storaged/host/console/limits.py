"""How much one peer, and all peers together, may take of the console. Pure bookkeeping.

A peer is an address on TCP (a /64 of IPv6, as one machine has that many) and a user on a unix socket. At its limit
a peer loses its own oldest connection that waits for something, so a good client on the same address still gets in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds. `send_s`: how long a reader may take nothing; `handshake_s`: of TLS."""

    header_s: float = 10.0
    body_s: float = 10.0
    send_s: float = 20.0
    handshake_s: float = 5.0
    connections: int = 512
    connections_per_peer: int = 64
    streams: int = 128
    streams_per_peer: int = 32


def peer_name(host: str) -> str:
    """The peer that the address `host` belongs to."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address) or address.is_loopback:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


@dataclass(slots=True)
class Crowd(Generic[_T]):
    """Who is connected, by peer, oldest first. `waits`: is a member waiting, so that it may be put out?

    `per_peer`: how many of one peer there may be before those that wait are put out; twice as many while all work.
    """

    per_peer: int
    most: int
    waits: Callable[[_T], bool]
    _by_peer: dict[str, dict[_T, None]] = field(default_factory=dict)
    _count: int = 0

    def room(self, peer: str) -> tuple[bool, _T | None]:
        """Whether one more of `peer` fits, and who has to leave for it."""
        mine = len(self._by_peer.get(peer, {}))
        full = self._count >= self.most
        if mine < self.per_peer and not full:
            return True, None
        largest = max(self._by_peer, key=lambda each: len(self._by_peer[each]))
        victim = self._oldest(peer if mine >= self.per_peer else largest)
        # One that is at work is done in a moment: twice as many may be, or a burst would shut good clients out.
        return victim is not None or (not full and mine < 2 * self.per_peer), victim

    def _oldest(self, peer: str) -> _T | None:
        return next((each for each in self._by_peer.get(peer, {}) if self.waits(each)), None)

    def add(self, peer: str, member: _T) -> None:
        """One more."""
        self._by_peer.setdefault(peer, {})[member] = None
        self._count += 1

    def discard(self, peer: str, member: _T) -> None:
        """It has left, or was never there."""
        mine = self._by_peer.get(peer, {})
        if member in mine:
            del mine[member]
            self._count -= 1
            if not mine:
                del self._by_peer[peer]


@dataclass(slots=True)
class Streams:
    """How many event streams each peer has."""

    limits: Limits
    _by_peer: dict[str, int] = field(default_factory=dict)

    def full(self, peer: str) -> str:
        """Why `peer` can have no more; empty when it can."""
        if self._by_peer.get(peer, 0) >= self.limits.streams_per_peer:
            return f"{peer} has {self.limits.streams_per_peer} live pages of this console open, the most for one peer"
        if sum(self._by_peer.values()) >= self.limits.streams:
            return f"{self.limits.streams} live pages of this console are open, the most that it serves"
        return ""

    def begin(self, peer: str) -> None:
        """One more."""
        self._by_peer[peer] = self._by_peer.get(peer, 0) + 1

    def end(self, peer: str) -> None:
        """One less."""
        self._by_peer[peer] -= 1
        if not self._by_peer[peer]:
            del self._by_peer[peer]
