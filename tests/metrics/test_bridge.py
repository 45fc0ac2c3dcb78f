"""What is written is what the formats' own readers read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from storaged.metrics.bridge import registry
from storaged.metrics.family import Distribution, Family, Metric, Type
from tests.metrics.support import OPENMETRICS, promtool, written

NUMBERS = st.one_of(st.integers(-(2**53), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"), max_size=20)
BOUNDS = (0.01, 1.0, 10.0)
GAUGE = Family("g_bytes", Type.GAUGE, 'Some "bytes"', (("one", ()), ("two", ())))
COUNTER = Family("c_total", Type.COUNTER, "Counted")
HISTOGRAM = Family("h_seconds", Type.HISTOGRAM, "Took", (("one", ()),))


class Fixed:
    """Has these metrics."""

    families = (GAUGE, COUNTER, HISTOGRAM)

    def __init__(self, *metrics: Metric) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Them."""
        return iter(self._metrics)


class Unreadable(Fixed):
    """Has metrics that cannot be read."""

    def collect(self) -> Iterator[Metric]:
        """Not at all."""
        raise OSError("gone")


def read(parse: Any, text: str) -> dict[Any, float]:
    """By name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in parse(text)
        for sample in family.samples
    }


@given(
    st.dictionaries(st.tuples(WORDS, WORDS), NUMBERS, max_size=4),
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    st.floats(0, 1e6),
)
def test_every_value_comes_back(
    gauges: dict[tuple[str, str], float], count: int, parts: list[int], total: float
) -> None:
    fixed = Fixed(
        Metric(GAUGE, {(*labels,): value for labels, value in gauges.items()}),
        Metric(COUNTER, {(): count}),
        Metric(HISTOGRAM, {("x",): Distribution(BOUNDS, parts, total)}),
    )
    wanted: dict[Any, Any] = {("g_bytes", (("one", a), ("two", b))): value for (a, b), value in gauges.items()}
    wanted["c_total", ()] = count
    for index, bound in enumerate(("0.01", "1.0", "10.0", "+Inf")):
        wanted["h_seconds_bucket", (("le", bound), ("one", "x"))] = sum(parts[: index + 1])
    wanted["h_seconds_sum", (("one", "x"),)] = total
    wanted["h_seconds_count", (("one", "x"),)] = sum(parts)
    wanted = {name: float(value) for name, value in wanted.items()}
    assert read(parse_text, written(fixed)) == wanted
    assert read(parse_openmetrics, written(fixed, accept=OPENMETRICS)) == wanted


def test_what_has_no_value_is_not_mentioned() -> None:
    assert written(Fixed(Metric(COUNTER)), accept=OPENMETRICS) == "# EOF\n"


def test_registering_reads_nothing() -> None:
    made = registry(Unreadable())
    with pytest.raises(OSError, match="gone"):
        list(made.collect())


def test_two_that_have_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="c_total"):
        registry(Fixed(), Fixed())


def test_prometheus_own_tool_reads_it() -> None:
    text = written(Fixed(Metric(GAUGE, {('a"\\\n', "b"): 1}), Metric(COUNTER, {(): 2})))
    done = promtool("check", "metrics", stdin=text.encode())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_who_serves_no_metrics_does_not_load_the_library() -> None:
    program = "import sys, storaged.app, storaged.host.service; sys.exit('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 0
