"""Metrics as Prometheus reads them: its text format, and OpenMetrics.

Written here because the library for it loads an HTTP client, a mail parser and TLS: 7 MB, a sixth of all that a daemon
takes. Its parsers and promtool judge in the tests what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Protocol

from storaged.metrics.family import Distribution, Family, Metric, Type

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Collector(Protocol):
    """Whoever has metrics. Asked from any thread."""

    def collect(self) -> Iterator[Metric]:
        """Each of them, as it is now."""
        ...


def chosen(accept: str) -> str:
    """The content type for a request's `Accept`: OpenMetrics for those who name it."""
    return OPENMETRICS if "application/openmetrics-text" in accept else TEXT


def written(collectors: Iterable[Collector], kind: str = TEXT) -> str:
    """All that is there now."""
    lines: list[str] = []
    for collector in collectors:
        for metric in collector.collect():
            if metric.values:
                lines += _lines(metric, strict=kind == OPENMETRICS)
    if kind == OPENMETRICS:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _lines(metric: Metric, *, strict: bool) -> Iterator[str]:
    """`strict`: OpenMetrics names a counter without its `_total`, and has quotes in a help text escaped."""
    family = metric.family
    name = family.name.removesuffix("_total") if strict and family.type is Type.COUNTER else family.name
    about = family.help.replace("\\", "\\\\").replace("\n", "\\n")
    yield f"# HELP {name} {_escaped(family.help) if strict else about}"
    yield f"# TYPE {name} {family.type.value}"
    for labels, value in metric.values.items():
        pairs = [f'{key}="{_escaped(word)}"' for key, word in zip(family.label_names, labels, strict=True)]
        if isinstance(value, Distribution):
            yield from _buckets(family, pairs, value)
        else:
            yield f"{family.name}{_braced(pairs)} {_number(value)}"


def _buckets(family: Family, pairs: list[str], value: Distribution) -> Iterator[str]:
    counts = list(accumulate(value.counts))
    for bound, count in zip((*(repr(float(one)) for one in value.bounds), "+Inf"), counts, strict=True):
        bucket = [*pairs, f'le="{bound}"']
        yield f"{family.name}_bucket{_braced(bucket)} {count}"
    yield f"{family.name}_sum{_braced(pairs)} {_number(value.total)}"
    yield f"{family.name}_count{_braced(pairs)} {counts[-1]}"


def _braced(pairs: list[str]) -> str:
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _number(value: float) -> str:
    """Whole numbers with every digit: bytes must not lose any."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
