"""What an administrator may choose about sharing and resizing."""

from __future__ import annotations

from dataclasses import dataclass, field

from storaged.units import GIB, MIB


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a pool is shared; sizes in bytes, times in seconds."""

    reserve_least: int = field(default=GIB, metadata={"help": "Bytes never promised to any guest."})
    reserve_most: int = field(default=16 * GIB, metadata={"help": "Bytes above which the reserve does not adapt."})
    reserve_share: float = field(
        default=0.25, metadata={"help": "Share of the pool above which the reserve does not adapt."}
    )
    base: int = field(default=GIB, metadata={"help": "Bytes that an idle guest should be able to write at once."})
    horizon_s: float = field(default=30.0, metadata={"help": "Seconds of writing that a guest gets ahead when tight."})
    horizon_roomy_s: float = field(default=60.0, metadata={"help": "Seconds of writing ahead when there is room."})
    rise_s: float = field(default=3.0, metadata={"help": "Seconds in which a guest's rate follows a rise."})
    fall_s: float = field(default=30.0, metadata={"help": "Seconds in which a guest's rate follows a fall."})
    kept_share: float = field(default=1 / 8, metadata={"help": "Share of the pool always kept for fast grants."})
    idle_share: float = field(
        default=0.5, metadata={"help": "Share of a tight pool that may lie with guests that do not write."}
    )
    band: float = field(default=0.05, metadata={"help": "Share by which a grant must change when tight."})
    band_roomy: float = field(default=0.25, metadata={"help": "Share by which a grant must change with room."})
    band_least: int = field(default=64 * MIB, metadata={"help": "Bytes by which a grant must change when tight."})
    least: int = field(default=4 * MIB, metadata={"help": "Bytes by which a grant changes at least, always."})
    plea_s: float = field(default=10.0, metadata={"help": "Seconds for which a guest's plea for room counts."})
    low: int = field(default=2 * GIB, metadata={"help": "Free bytes that enter LOW; twice as many leave it."})
    critical: int = field(default=GIB, metadata={"help": "Free bytes that enter CRITICAL; twice as many leave it."})
    dwell_s: float = field(default=10.0, metadata={"help": "Seconds that a better level must last before it counts."})
    looks: float = field(default=20.0, metadata={"help": "Looks at the pool until it would be full at this rate."})
    poll_least_s: float = field(default=0.25, metadata={"help": "Shortest time between two looks, in seconds."})
    poll_most_s: float = field(default=1.0, metadata={"help": "Longest time between two looks, in seconds."})
    poll_soon_s: float = field(default=0.1, metadata={"help": "Seconds until the look after a guest has answered."})
    answer_s: float = field(default=5.0, metadata={"help": "Seconds after which a guest without answer is hanging."})
    retry_first_s: float = field(default=1.0, metadata={"help": "Seconds until a failed grant is sent again."})
    retry_most_s: float = field(default=30.0, metadata={"help": "Longest time between two tries, in seconds."})
    worst_half_s: float = field(default=60.0, metadata={"help": "Seconds in which half of a worst case is forgotten."})
    overcommit_limit: float = field(
        default=10.0, metadata={"help": "Times its size that a pool's guests may be promised by resizes, in sum."}
    )
    overrun: int = field(default=64 * MIB, metadata={"help": "Bytes over its grant that a guest is forgiven."})
    overrun_s: float = field(
        default=3.0, metadata={"help": "Seconds for which a guest's next report may explain what exceeds its grant."}
    )
    restart_s: float = field(
        default=60.0, metadata={"help": "Seconds after a start of its agent in which another one unbinds no guest."}
    )
    fence_s: float = field(
        default=600.0, metadata={"help": "Seconds for which a guest that exceeded its grant is granted nothing."}
    )


@dataclass(frozen=True, slots=True)
class Resizing:
    """How resizes are run: the table [resize]."""

    state_dir: str = field(
        default="/var/lib/storaged-host", metadata={"help": "Directory in which running resizes are written down."}
    )
    patience_s: float = field(
        default=120.0, metadata={"help": "Seconds a guest may be silent before its resize fails."}
    )
    capacity_s: float = field(
        default=60.0, metadata={"help": "Seconds a guest's kernel may take to see its larger disk."}
    )
    poll_s: float = field(default=0.2, metadata={"help": "Seconds between two questions to a guest at work."})
    keep: int = field(default=20, metadata={"help": "Number of ended resizes that are remembered."})
