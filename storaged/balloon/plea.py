"""When to ask the host for room: applications will soon have spent what the balloon leaves them. PURE.

Only a fall counts. A guest that stands still near zero asks nothing: its host sees that by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from storaged.units import MIB

SOON_S, AHEAD_S = 5.0, 30.0
"""A plea is due when nothing will be left within the first; it asks for the second at the present rate."""
BUSY = 256 * 1024.0
"""Bytes a second from which a guest counts as one that writes."""
LEAST = 64 * MIB
AGAIN_S = 2.0
LOOK_MOST_S, LOOK_LEAST_S = 1.0, 0.2
_FOLLOWS_S = 2.0
"""A lone reading is jitter; the rate follows within this."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was read last: when, how much, how fast it falls; and when it was asked for more."""

    at: float | None = None
    available: int = 0
    rate: float = 0.0
    asked_at: float | None = None


def look(seen: Seen, available: int, held: int, at: float) -> tuple[Seen, int]:
    """After a reading: what is known now, and how many bytes to ask for; 0 for none."""
    if seen.at is None or at <= seen.at:
        return Seen(at, available, 0.0, seen.asked_at), 0
    over_s = at - seen.at
    fell = (seen.available - available) / over_s
    # A grant, or a deletion, raises what is left: that says nothing of how fast is written.
    rate = seen.rate if fell < 0 else seen.rate + (fell - seen.rate) * min(over_s / _FOLLOWS_S, 1.0)
    due = rate > BUSY and available < rate * SOON_S
    size = min(max(int(rate * AHEAD_S), LEAST), held)
    if not due or size <= 0 or (seen.asked_at is not None and at < seen.asked_at + AGAIN_S):
        return Seen(at, available, rate, seen.asked_at), 0
    return Seen(at, available, rate, at), size


def pause(seen: Seen, held: int) -> float:
    """Seconds until the next reading: a quarter of what is left at this rate."""
    if not held or seen.rate <= BUSY:
        return LOOK_MOST_S
    return min(max(seen.available / seen.rate / 4, LOOK_LEAST_S), LOOK_MOST_S)
