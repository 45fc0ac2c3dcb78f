"""How much a pool's guests may be promised in sum by resizes. Pure.

Thin images make every size look affordable: `resize b 10T` on a pool of 3 GiB is done at once, changes the guest's
filesystem for good, and takes a long shrink to undo. So growth beyond a multiple of the pool's size has to be asked
for in so many words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storaged.errors import Kind, StoragedError
from storaged.units import format_size, sector_floor


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a pool's guests, in bytes. `total`: of what backs the pool, 0 when not known; `limit`: a ratio."""

    pool: str
    total: int
    limit: float
    guests: Mapping[str, int]

    @property
    def promised(self) -> int:
        """The sum of all sizes."""
        return sum(self.guests.values())

    @property
    def most(self) -> int:
        """What the sum may be brought to."""
        return int(self.total * self.limit)

    def accepted(self, guest: str) -> int:
        """The largest size that `guest` may be given: never less than it has."""
        now = self.guests.get(guest, 0)
        return max(sector_floor(max(self.most - (self.promised - now), 0)), now)

    def agree(self, guest: str, to: int) -> None:
        """Raises StoragedError when `guest` may not grow to `to`: PRECONDITION with the figures."""
        if not self.total:
            raise StoragedError(
                f"the size of pool {self.pool} is not known yet, so whether it can back {format_size(to)} is not "
                f"either; try again, or {_HOW}",
                Kind.UNAVAILABLE,
            )
        accepted = self.accepted(guest)
        if to <= accepted:
            return
        now = self.guests.get(guest, 0)
        promised = self.promised - now + to
        raise StoragedError(
            f"resize of {guest} to {to} bytes ({format_size(to)}) refused: pool {self.pool} has {self.total} bytes "
            f"({format_size(self.total)}), and its guests would be promised {promised} ({format_size(promised)}), "
            f"{promised / self.total:.1f} times that; sharing.overcommit_limit is {self.limit:g} times "
            f"({format_size(self.most)}). Accepted for {guest}: at most {accepted} bytes ({format_size(accepted)}). "
            f"To promise more all the same, {_HOW}",
            Kind.PRECONDITION,
        )


_HOW = "use storagectl resize --allow-overcommit, or allow_overcommit in the request"
