"""The contract: every metric of the host, its labels and when it is there. docs/metrics.md is made from this table."""

from __future__ import annotations

from storaged.host.levels import Level
from storaged.metrics.family import Family, Type

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds from a crossing to the last guest's answer; the goal for a thousand guests is 0.25."""
UNREAD = "none"
LEVELS = (UNREAD, *(level.name.lower() for level in Level))
FELL, ROSE, GUESTS = "pool_fell", "pool_rose", "guests"
REASONS = (FELL, ROSE, GUESTS)
LOOKED = "once the pool was looked at"
BOUND = "once the guest was told one"
RUNS = "while its machine runs"
REPORTED = "once the guest reported; only a storaged does"
_G, _C, _H = Type.GAUGE, Type.COUNTER, Type.HISTOGRAM
_POOL = (("pool", ()),)
_VM = (("vm", ()),)

POOL_SIZE = Family("storaged_host_pool_size_bytes", _G, "Bytes of the pool", _POOL)
POOL_FREE = Family("storaged_host_pool_free_bytes", _G, "Bytes free in the pool", _POOL, LOOKED)
POOL_RESERVE = Family("storaged_host_pool_reserve_bytes", _G, "Bytes kept from every guest", _POOL, LOOKED)
POOL_PROMISED = Family(
    "storaged_host_pool_promised_bytes",
    _G,
    "Bytes that guests may still write; never more than free less reserve",
    _POOL,
    LOOKED,
)
PRESSURE = Family(
    "storaged_host_pressure",
    _G,
    "Level of the pool: 1 at the present one, none before the first look",
    (*_POOL, ("state", LEVELS)),
)
GRANT = Family("storaged_host_guest_grant_bytes", _G, "Bytes the guest may write, as it was last told", _VM, BOUND)
AVAILABLE = Family(
    "storaged_host_guest_available_bytes", _G, "Bytes the guest says that its applications can write", _VM, REPORTED
)
BALLOON = Family("storaged_host_guest_balloon_bytes", _G, "Bytes its balloon holds", _VM, REPORTED)
WEIGHT = Family("storaged_host_guest_weight", _G, "Its share against others", _VM)
UP = Family("storaged_host_guest_up", _G, "1 while it answers, 0 while it is silent", _VM, RUNS)
OVERRUNS = Family(
    "storaged_host_guest_overruns_total", _C, "Times that the guest's image grew beyond all that it may write", _VM
)
FENCED = Family("storaged_host_guest_fenced", _G, "1 while it is granted nothing because it exceeded its grant", _VM)
LEFT = Family(
    "storaged_host_guest_may_write_bytes",
    _G,
    "Bytes that the guest may still write by any kind of write, at most, as the host reckons",
    _VM,
    RUNS,
)
IMAGE = Family("storaged_host_image_allocated_bytes", _G, "What its image costs the host", _VM)
REBALANCES = Family(
    "storaged_host_rebalances_total",
    _C,
    "Times that grants were changed, by what came before: free space fell or rose, or guests wanted more or less",
    (("reason", REASONS),),
)
REACTION = Family("storaged_host_reaction_seconds", _H, "From a worse level to the last guest's answer")

HOST = (
    POOL_SIZE,
    POOL_FREE,
    POOL_RESERVE,
    POOL_PROMISED,
    PRESSURE,
    GRANT,
    AVAILABLE,
    BALLOON,
    WEIGHT,
    UP,
    LEFT,
    OVERRUNS,
    FENCED,
    IMAGE,
    REBALANCES,
    REACTION,
)
