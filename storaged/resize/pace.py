"""How long a shrink rests between two pieces of its work, so that applications get their share of the disk. Pure.

While the kernel relocates, every commit of an application waits for its commits. A rest does not make those waits
shorter, but fewer: of an application that commits all the time, the share that met the work is what it takes of the
time, weighted by how much slower commits are meanwhile.
"""

from __future__ import annotations

RESTS = {"low": 8.0, "normal": 1.0, "high": 0.0}
"""By `storage.resize_impact`: seconds of rest for a second of work, while others write."""
MOST_S = 60.0
"""Longest rest, in seconds: a shrink that moves a very slow chunk still goes on."""
LOOK_S = 0.05
"""How often a rest looks whether anybody else writes, in seconds."""
QUIET = 64 << 10
"""Fewer bytes than that in one look are nobody's work worth a rest."""


def rest_s(impact: str, worked_s: float) -> float:
    """Seconds to rest after so many seconds of moving; raises KeyError for an unknown impact."""
    return min(RESTS[impact] * worked_s, MOST_S)
