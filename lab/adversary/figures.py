"""What happened in a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from storaged.units import GIB, MIB

IDLE_GROWTH = MIB
"""Bytes of the image of an idle guest that one report may cost."""
UNFAIR_S = 5.0
"""Seconds for which a good guest may be below its fair share: a few answers of a busy guest."""


@dataclass(slots=True)
class Figures:
    """What happened. Threads add to it; each field is written by one of them, or is a count that may be off by one."""

    written: int = 0
    enospc: int = 0
    io_errors: int = 0
    errors: list[str] = field(default_factory=list)
    damaged: int = 0
    whole: int = 0
    host_full: int = 0
    least_free: int = 1 << 62
    bursts: int = 0
    idle_growth: int = 0
    """Bytes by which the image of a guest without applications grew in `idle_reports` reports."""
    idle_reports: int = 0
    overruns: Counter[str] = field(default_factory=Counter)
    """How often each obedient guest was said to have exceeded its grant."""
    fenced: int = 0
    """How often the liar was found out."""
    unfair_s: float = 0.0
    """The longest time for which a good guest had less than nine tenths of a fair share."""
    kills: Counter[str] = field(default_factory=lambda: Counter(controller=0, daemon=0))
    did: Counter[str] = field(default_factory=Counter)
    """What the attackers did."""
    checks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        did = ", ".join(f"{count} {name}" for name, count in sorted(self.did.items()))
        return (
            f"{self.written / GIB:.1f} GiB written, ENOSPC {self.enospc} times; I/O errors {self.io_errors};"
            f" files whole {self.whole}, damaged {self.damaged}; host full {self.host_full} times, least free"
            f" {self.least_free // MIB} MiB; {self.bursts} bursts; kills {dict(self.kills)};"
            f" obedient guests called overruns {dict(self.overruns)}, liar found out {self.fenced} times;"
            f" below a fair share for {self.unfair_s:.1f} s at most; {did or 'no other attackers'};"
            f" idle guest: image {self.idle_growth / MIB:+.1f} MiB in {self.idle_reports} reports;"
            f" btrfs check {'; '.join(self.checks) or 'clean'}{''.join(f'; {each}' for each in self.errors[:5])}"
        )

    @property
    def unharmed(self) -> bool:
        """Nothing was lost, nobody was wronged, and the host never ran out."""
        idle = self.idle_growth <= IDLE_GROWTH * self.idle_reports
        fair = self.unfair_s <= UNFAIR_S and not self.overruns
        return idle and fair and not (self.io_errors or self.damaged or self.host_full or self.checks)

    def lost(self, what: str, error: object) -> None:
        """A write that was accepted, or had its room for certain, failed."""
        self.io_errors += 1
        self.errors.append(f"{what}: {error}")
