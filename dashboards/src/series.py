"""Every series a query may use, with its labels and its unit: what guests and hosts serve."""

from __future__ import annotations

from dataclasses import dataclass

from storaged.metrics.families import GUEST, Type

WHERE = frozenset({"job", "instance", "host", "vm"})
"""Given by the scrape configuration."""


@dataclass(frozen=True, slots=True)
class Series:
    """What can be asked for: `counter` must be asked for as a rate or an increase."""

    labels: frozenset[str]
    counter: bool = False


def _guest() -> dict[str, Series]:
    known = {}
    for family in GUEST:
        labels = WHERE | set(family.label_names)
        for sample in family.samples:
            le = {"le"} if sample.endswith("_bucket") else set()
            known[sample] = Series(labels | le, counter=family.type is not Type.GAUGE)
    return known


def _host() -> dict[str, Series]:
    """The host's side: `vm` is a label of the series itself there, not of the scrape configuration."""
    at = WHERE - {"vm"}
    known = {
        f"storaged_host_pool_{part}_bytes": Series(at | {"pool"}) for part in ("size", "free", "reserve", "promised")
    }
    known["storaged_host_pressure"] = Series(at | {"pool", "state"})
    for part in ("grant_bytes", "available_bytes", "balloon_bytes", "weight", "up"):
        known[f"storaged_host_guest_{part}"] = Series(at | {"vm"})
    known["storaged_host_image_allocated_bytes"] = Series(at | {"vm"})
    known["storaged_host_rebalances_total"] = Series(at | {"reason"}, counter=True)
    for part in ("bucket", "sum", "count"):
        le = {"le"} if part == "bucket" else set()
        known[f"storaged_host_reaction_seconds_{part}"] = Series(at | le, counter=True)
    return known


def _calls() -> dict[str, Series]:
    labels = WHERE | {"grpc_type", "grpc_service", "grpc_method"}
    known = {
        "grpc_server_started_total": Series(labels, counter=True),
        "grpc_server_handled_total": Series(labels | {"grpc_code"}, counter=True),
    }
    for part in ("bucket", "sum", "count"):
        le = {"le"} if part == "bucket" else set()
        known[f"grpc_server_handling_seconds_{part}"] = Series(labels | le, counter=True)
    return known


HOST = _host()
CALLS = _calls()
KNOWN: dict[str, Series] = {**_guest(), **HOST, **CALLS, "up": Series(WHERE)}
