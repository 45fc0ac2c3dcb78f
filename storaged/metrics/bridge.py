"""Hands our metrics to prometheus_client, which writes them in whichever format a scraper asks for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Exposed
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from storaged.metrics.family import Distribution, Family, Metric, Type

Kind = type[CounterMetricFamily] | type[GaugeMetricFamily] | type[HistogramMetricFamily]
_KINDS: dict[Type, Kind] = {
    Type.COUNTER: CounterMetricFamily,
    Type.GAUGE: GaugeMetricFamily,
    Type.HISTOGRAM: HistogramMetricFamily,
}


class Source(Protocol):
    """Whoever has metrics. Asked from any thread."""

    @property
    def families(self) -> tuple[Family, ...]:
        """All that it may have."""
        ...

    def collect(self) -> Iterator[Metric]:
        """Each of them, as it is now."""
        ...


def registry(*sources: Source) -> CollectorRegistry:
    """One that has what `sources` have, and nothing of this process'."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's only untyped function here
    made = CollectorRegistry()
    for source in sources:
        made.register(_Bridge(source))
    return made


class _Bridge(Collector):
    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterator[Exposed]:
        """The families without samples: registering must not read anything."""
        for family in self._source.families:
            yield _empty(family)

    def collect(self) -> Iterator[Exposed]:
        """In the source's order; one that has no samples now is left out."""
        for metric in self._source.collect():
            if metric.values:
                yield _exposed(metric)


def _empty(family: Family) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    return _KINDS[family.type](family.name, family.help, labels=family.label_names)


def _exposed(metric: Metric) -> Exposed:
    exposed = _empty(metric.family)
    for labels, value in metric.values.items():
        if isinstance(exposed, HistogramMetricFamily):
            assert isinstance(value, Distribution)
            bounds = [*map(floatToGoString, value.bounds), "+Inf"]
            exposed.add_metric(labels, list(zip(bounds, accumulate(value.counts), strict=True)), value.total)
        else:
            assert not isinstance(value, Distribution)
            exposed.add_metric(labels, value)
    return exposed
