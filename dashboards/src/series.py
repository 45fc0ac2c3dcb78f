"""Every series a query may use, with its labels and its unit: what guests and hosts serve."""

from __future__ import annotations

from dataclasses import dataclass

from storaged.host import families
from storaged.metrics.calls import CALLS
from storaged.metrics.families import GUEST
from storaged.metrics.family import Family, Type

WHERE = frozenset({"job", "instance", "host", "vm"})
"""Given by the scrape configuration."""


@dataclass(frozen=True, slots=True)
class Series:
    """What can be asked for: `counter` must be asked for as a rate or an increase."""

    labels: frozenset[str]
    counter: bool = False


def _known(families: tuple[Family, ...], where: frozenset[str] = WHERE) -> dict[str, Series]:
    known = {}
    for family in families:
        labels = where | set(family.label_names)
        for sample in family.samples:
            le = {"le"} if sample.endswith("_bucket") else set()
            known[sample] = Series(labels | le, counter=family.type is not Type.GAUGE)
    return known


# The host's own series bear the label `vm` themselves.
HOST = _known(families.HOST, WHERE - {"vm"})
KNOWN: dict[str, Series] = {**_known(GUEST), **HOST, **_known(CALLS), "up": Series(WHERE)}
