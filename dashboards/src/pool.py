"""One host's pool: what is free, what is kept, what is promised, and to whom."""

from __future__ import annotations

from dashboards.src.guest import LEVELS, state
from dashboards.src.model import (
    ANY_IS_BAD,
    BYTES,
    COUNT,
    LITTLE_IS_BAD,
    NEGATIVE_IS_BAD,
    SECONDS,
    Board,
    Kind,
    Panel,
    Query,
    Row,
    Variable,
    lines,
    stat,
)

P = 'job=~"$controller", host=~"$host", pool=~"$pool"'
H = 'job=~"$controller", host=~"$host"'


def pool(part: str) -> str:
    """A pool's bytes."""
    return f"storaged_host_pool_{part}_bytes{{{P}}}"


SLACK = f"{pool('free')} - {pool('reserve')} - {pool('promised')}"

NOW = Row(
    "Now",
    (
        stat(
            "Not promised",
            "Free less the reserve less all promises. Below 0 the guests together may fill the disk.",
            f"min({SLACK})",
            BYTES,
            steps=NEGATIVE_IS_BAD,
            runbook="StoragedPoolOverpromised",
        ),
        stat("Free", "Bytes left on the host's disk.", f"sum({pool('free')})", BYTES, steps=LITTLE_IS_BAD),
        stat("Reserve", "Bytes kept from all guests, for other writers on the host.", f"sum({pool('reserve')})", BYTES),
        stat("Promised", "What guests may still write, altogether.", f"sum({pool('promised')})", BYTES),
        stat(
            "Pressure",
            "The host's own view of its disk; the worst pool counts.",
            f"max({state('storaged_host_pressure', LEVELS, P, 'host, pool')})",
            COUNT,
            names=LEVELS,
        ),
        stat(
            "Silent guests",
            "Guests that do not answer; what they were granted stays set aside.",
            f"sum(storaged_host_guest_up{{{H}}} == bool 0)",
            COUNT,
            steps=ANY_IS_BAD,
            runbook="StoragedDown",
        ),
    ),
)
POOL = Row(
    "Pool",
    (
        lines(
            "Promises against the pool",
            "The promises must stay below what is free less the reserve.",
            BYTES,
            (f"sum by (pool) ({pool('promised')})", "{{pool}}: promised"),
            (f"sum by (pool) ({pool('free')} - {pool('reserve')})", "{{pool}}: free less reserve"),
            runbook="StoragedPoolOverpromised",
        ),
        lines(
            "Disk",
            "Size, free and reserve.",
            BYTES,
            (f"sum by (pool) ({pool('size')})", "{{pool}}: size"),
            (f"sum by (pool) ({pool('free')})", "{{pool}}: free"),
            (f"sum by (pool) ({pool('reserve')})", "{{pool}}: reserve"),
        ),
    ),
)
GUESTS = Row(
    "Guests",
    (
        Panel(
            "Grants by guest",
            "What each guest may still write.",
            Kind.STACK,
            BYTES,
            (Query(f"sum by (vm) (storaged_host_guest_grant_bytes{{{H}}})", "{{vm}}"),),
            runbook="StoragedPoolOverpromised",
        ),
        Panel(
            "What images cost",
            "Blocks that the guests' images take on the disk.",
            Kind.STACK,
            BYTES,
            (Query(f"sum by (vm) (storaged_host_image_allocated_bytes{{{H}}})", "{{vm}}"),),
        ),
        lines(
            "Available in the guests",
            "What applications can write there.",
            BYTES,
            (f"sum by (vm) (storaged_host_guest_available_bytes{{{H}}})", "{{vm}}"),
            runbook="StoragedGuestNearlyFull",
        ),
        lines(
            "Balloons",
            "What the guests hold back.",
            BYTES,
            (f"sum by (vm) (storaged_host_guest_balloon_bytes{{{H}}})", "{{vm}}"),
            runbook="StoragedBalloonOffTarget",
        ),
        Panel(
            "Guests by what is left",
            "Everything about each, the one with the least to write first.",
            Kind.TABLE,
            BYTES,
            (
                Query(f"sum by (host, vm) (storaged_host_guest_available_bytes{{{H}}})", "available"),
                Query(f"sum by (host, vm) (storaged_host_guest_grant_bytes{{{H}}})", "grant"),
                Query(f"sum by (host, vm) (storaged_host_guest_balloon_bytes{{{H}}})", "balloon"),
                Query(f"sum by (host, vm) (storaged_host_image_allocated_bytes{{{H}}})", "image"),
                Query(f"sum by (host, vm) (storaged_host_guest_weight{{{H}}})", "weight"),
                Query(f"sum by (host, vm) (storaged_host_guest_up{{{H}}})", "answers"),
            ),
            width=24,
            units=(("weight", COUNT), ("answers", COUNT)),
        ),
    ),
)
SHARING = Row(
    "Sharing",
    (
        lines(
            "Rebalances by reason",
            "How often the shares were dealt anew, in the time between two points.",
            COUNT,
            (f"sum by (reason) (increase(storaged_host_rebalances_total{{{H}}}[$__rate_interval]))", "{{reason}}"),
        ),
        lines(
            "Reaction of the whole fleet",
            "From a threshold that was crossed to the last guest's answer: within this time 99 of 100 were.",
            SECONDS,
            (
                (
                    "histogram_quantile(0.99, sum by (le) (rate("
                    f"storaged_host_reaction_seconds_bucket{{{H}}}[$__rate_interval]))) >= 0"
                ),
                "99 of 100",
            ),
            quiet="nothing was crossed in this time",
            runbook="StoragedBalloonOffTarget",
        ),
    ),
)

BOARD = Board(
    "storaged-pool",
    "storaged / Host pool",
    "A host's disk: what is free, what is kept back, what is promised to guests, and who has what.",
    (
        Variable("controller", "Job", "label_values(storaged_host_pool_free_bytes, job)", many=True),
        Variable("host", "Host", 'label_values(storaged_host_pool_free_bytes{job=~"$controller"}, host)', many=True),
        Variable(
            "pool",
            "Pool",
            'label_values(storaged_host_pool_free_bytes{job=~"$controller", host=~"$host"}, pool)',
            many=True,
        ),
    ),
    (NOW, POOL, GUESTS, SHARING),
)
