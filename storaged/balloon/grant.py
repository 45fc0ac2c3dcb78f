"""What applications may still make the host's disk grow by: pure arithmetic on the host's last report.

All sizes are bytes of the host's disk: data and metadata count once per copy (DUP counts twice).

A grant covers everything that can reach the host's disk: data in new extents, metadata, and extents that applications
have preallocated but not written. The last kind needs no free room, so it is subtracted from what is left free. How
much it was at the time of the report is enough to know: preallocating more takes free room, and counts as spent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Grant:
    """The host's last report, and the filesystem as it was then.

    `spent` is what applications and metadata held when it was granted; None after a restart, when it is not known.
    `known` is False while `unwritten` is only an upper bound, because preallocated extents are still being counted.
    `device_written` is what had been written to the device by then.
    """

    limit: int
    spent: int | None = None
    unwritten: int = 0
    known: bool = True
    device_written: int = 0

    @property
    def free(self) -> int:
        """What of the limit could be left free at the time of the report."""
        return max(self.limit - self.unwritten, 0)

    @property
    def overcommitted(self) -> bool:
        """True when more is preallocated and unwritten than the limit allows: it cannot be kept."""
        return self.unwritten > self.limit


def left(grant: Grant, spent: int) -> int:
    """What may still be free when applications and metadata hold `spent`; all of it where nothing is known of before.

    Never more than at the time of the report, also after deletions: what they freed goes back to the host.
    """
    if grant.spent is None:
        return grant.free
    return min(max(grant.free - (spent - grant.spent), 0), grant.free)


def unexplained(grant: Grant, spent: int, unwritten: int) -> int:
    """By how much more is unwritten now than at the time of the report, beyond what was preallocated out of the grant.

    It took no free room, so it has to come out of what is left.
    """
    if grant.spent is None or not grant.known:
        return 0
    return max(unwritten - grant.unwritten - max(spent - grant.spent, 0), 0)


def committed(grant: Grant, spent: int) -> Grant:
    """The grant once a commit has shown what had been deleted before it: that is no room to be written again."""
    if grant.spent is None:
        return grant
    return replace(grant, spent=min(grant.spent, spent))


def counted_again(grant: Grant, spent: int, unwritten: int, *, device_written: int) -> Grant:
    """The grant after the preallocated extents were counted again, some time after the report.

    What reached the host since the report is at most what was written to the device, so that is what it has cost.
    """
    limit = max(grant.limit - max(device_written - grant.device_written, 0), 0)
    return Grant(limit, spent, unwritten, device_written=device_written)
