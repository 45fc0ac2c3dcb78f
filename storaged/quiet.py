"""Log lines about what peers do, at a bounded rate: one that is refused all the time does not fill the log."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

EVERY_S = 10.0
MOST = 256
"""Peers and reasons that are told apart; a flood from more peers than that is counted together."""
OTHERS = "other peers"


@dataclass(slots=True)
class BoundedLog:
    """Writes one line for each peer and reason in `every_s` seconds, with the number of those left out.

    The first is logged at once. Those that follow within `every_s` are counted, and logged as one line at its end,
    as so many `counted`. Needs a running event loop; used from its thread alone.
    """

    log: logging.Logger
    level: int = logging.WARNING
    every_s: float = EVERY_S
    counted: str = "refused"
    _counted: dict[tuple[str, str], int] = field(default_factory=dict)

    def note(self, peer: str, reason: str, text: str) -> None:
        """`peer` did it, or was refused, for `reason`, a word of ours; `text` is the line."""
        if (peer, reason) not in self._counted and len(self._counted) >= MOST:
            peer = OTHERS
        key = peer, reason
        if key in self._counted:
            self._counted[key] += 1
            return
        self.log.log(self.level, "%s", text)
        self._begin(key)

    def _begin(self, key: tuple[str, str]) -> None:
        self._counted[key] = 0
        asyncio.get_running_loop().call_later(self.every_s, self._end, key)

    def _end(self, key: tuple[str, str]) -> None:
        more = self._counted.pop(key)
        if more:
            peer, reason = key
            self.log.log(self.level, "%s: %d more %s in %g s: %s", peer, more, self.counted, self.every_s, reason)
            self._begin(key)


def peer_of(peer: str) -> str:
    """gRPC's name of a peer without what changes with every connection: a port, or the number behind a dash."""
    head, _, tail = peer.rpartition("-" if "-" in peer.rpartition("/")[2] else ":")
    return head if head and tail.isdigit() else peer
