"""Who had less than a fair share, and for how long, by what storaged-host itself tells."""

from __future__ import annotations

import time
from collections.abc import Mapping

from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.units import MIB

HUNGRY_S = 2.0
"""Seconds for which a guest counts as one that wants more, after it was told that there is no room."""
NEARLY = 0.9
BAND = 64 * MIB
"""By less than this no grant is changed while it is tight (`Sharing.band_least`)."""


def below(guests: Mapping[str, pb.Guest], hungry: Mapping[str, bool]) -> set[str]:
    """Guests that want more and may write less than nine tenths of an equal part of all that is granted.

    What a guest may write beyond any grant cannot be taken from it, and is no part of that.
    """
    can = {name: max(guest.left_bytes - guest.beyond_bytes, 0) for name, guest in guests.items() if counts(guest)}
    if not can:
        return set()
    equal = sum(can.values()) / len(can)
    return {name for name, wants in hungry.items() if wants and can.get(name, 0) < NEARLY * equal - BAND}


def counts(guest: pb.Guest) -> bool:
    """It answers, and knows a bound."""
    return guest.state == pb.GUEST_UP and guest.HasField("grant_bytes") and not guest.HasField("fenced_for_s")


class Watch:
    """How long each has been below, without an end; `longest` of all."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._since: dict[str, float] = {}

    def look(self, guests: Mapping[str, pb.Guest], hungry: Mapping[str, bool]) -> None:
        """One look; the more of them the better."""
        now = time.monotonic()
        poor = below(guests, hungry)
        self._since = {name: self._since.get(name, now) for name in poor}
        self.longest = max([self.longest, *(now - since for since in self._since.values())])

    def forget(self) -> None:
        """Nobody could be told anything meanwhile: the controller was away, or the pool must not be used."""
        self._since = {}
