"""What Grafana does with a dashboard: fill in its variables, ask its queries, name its lines. And what can go wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dashboards.src.model import BYTES, CALLS, COUNT, RATE, SECONDS, SHARE
from lab.prometheus import SCRAPE_S, BadQuery, Prometheus
from storaged.units import TIB
from tests.dashboards.lint import Json, panels, variables

PLAUSIBLE = {
    BYTES: (-TIB, 100 * TIB),
    RATE: (0, TIB),
    SECONDS: (0, 3600),
    SHARE: (0, 1),
    COUNT: (0, 1e6),
    CALLS: (0, 1e5),
}
"""By unit; seconds are ages and durations: a Unix time is none."""
EMPTY = ": empty"


@dataclass(frozen=True, slots=True)
class Window:
    """The time that is shown."""

    start: float
    end: float

    @property
    def step(self) -> float:
        """Between two points."""
        return max(float(SCRAPE_S), (self.end - self.start) / 1000)

    def fill(self, text: str) -> str:
        """Grafana's own variables."""
        rate = max(self.step + SCRAPE_S, 4 * SCRAPE_S)
        text = text.replace("$__rate_interval", f"{rate:g}s").replace("$__interval", f"{self.step:g}s")
        return text.replace("$__range", f"{max(round(self.end - self.start), 1)}s")


def choices(board: Json, prometheus: Prometheus) -> tuple[dict[str, list[str]], list[str]]:
    """What each variable offers, in order, each filled in with those before it; and what is wrong with them."""
    offered: dict[str, list[str]] = {}
    wrong = []
    for name, one in variables(board).items():
        if one["type"] != "query":
            continue
        asked = re.fullmatch(r"label_values\((?P<selector>.+), (?P<label>\w+)\)", one["query"]["query"])
        if asked is None:
            wrong.append(f"${name}: {one['query']['query']} is not understood")
            continue
        selector = fill(asked["selector"], {key: values[:1] for key, values in offered.items()}, board)
        try:
            offered[name] = prometheus.label_values(selector, asked["label"])
        except BadQuery as error:
            wrong.append(f"${name}: {error}")
            continue
        if not offered[name]:
            wrong.append(f"${name}: nothing to choose")
    return offered, wrong


def fill(text: str, chosen: dict[str, list[str]], board: Json, *, everything: bool = False) -> str:
    """`text` with the chosen values: several become (a|b), All what the dashboard says."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name not in chosen:
            return found[0]
        one = variables(board)[name]
        if everything and one.get("includeAll"):
            return str(one.get("allValue") or "(" + "|".join(chosen[name]) + ")")
        if not one.get("multi"):
            return chosen[name][0]
        escaped = [re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\\\1", item) for item in chosen[name]]
        return escaped[0] if len(escaped) == 1 else "(" + "|".join(escaped) + ")"

    return re.sub(r"\$(\w+)", value, text)


def selections(board: Json, offered: dict[str, list[str]]) -> Iterator[tuple[dict[str, list[str]], bool]]:
    """What people choose: All, then each guest alone where one is chosen."""
    single = [name for name in offered if not variables(board)[name].get("multi")]
    if not single:
        yield offered, True
        yield {name: values[:1] for name, values in offered.items()}, False
    for name in single:
        for value in offered[name]:
            yield {**offered, name: [value]}, True


def faults(board: Json, prometheus: Prometheus, window: Window, *, idle: bool = False) -> list[str]:
    """All that people would see go wrong. `idle`: a line may be missing, a panel that shows nothing must say why."""
    offered, wrong = choices(board, prometheus)
    if wrong:
        return wrong
    for chosen, everything in selections(board, offered):
        for panel in panels(board):
            found = list(_panel(board, panel, prometheus, window, (chosen, everything)))
            missing = [one for one in found if one.endswith(EMPTY)]
            if idle and (len(missing) < len(panel["targets"]) or panel["fieldConfig"]["defaults"].get("noValue")):
                found = [one for one in found if one not in missing]
            wrong += found
    return list(dict.fromkeys(wrong))


def _panel(
    board: Json, panel: Json, prometheus: Prometheus, window: Window, selection: tuple[dict[str, list[str]], bool]
) -> Iterator[str]:
    chosen, everything = selection
    names: list[str] = []
    for target in panel["targets"]:
        title = f"{panel['title']} ({target['refId']})"
        expression = window.fill(fill(target["expr"], chosen, board, everything=everything))
        try:
            if target.get("instant"):
                series = prometheus.at(expression, window.end)
            else:
                series = prometheus.over(expression, window.start, window.end, window.step)
        except BadQuery as error:
            yield f"{title}: {error}"
            continue
        if not series:
            yield title + EMPTY
        for one in series:
            yield from _line(title, panel, target, one)
            names.append(_named(target["legendFormat"], one["metric"]))
        if panel["type"] == "table" and any(not {"host", "vm"} <= set(one["metric"]) for one in series):
            yield f"{title}: rows that no other column can be joined to"
        if panel["type"] == "stat" and len(series) != 1:
            yield f"{title}: {len(series)} numbers where one is shown"
    if panel["type"] != "table" and len(set(names)) != len(names):
        yield f"{panel['title']}: two lines of one name"


def _named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), legend)


def _line(title: str, panel: Json, target: Json, series: Json) -> Iterator[str]:
    for label in re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]):
        if not series["metric"].get(label):
            yield f"{title}: no label {label} for its legend"
    values = [float(value) for _, value in series["values"]]
    if not all(math.isfinite(value) for value in values):
        yield f"{title}: not finite"
        return
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults["unit"]
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == target["legendFormat"]:
            unit = next((p["value"] for p in override["properties"] if p["id"] == "unit"), unit)
    low, high = PLAUSIBLE.get(unit, (math.inf, -math.inf))
    if not all(low <= value <= high for value in values):
        yield f"{title}: {values[-1]:g} is no {unit}"
    mapped = {option for mapping in defaults.get("mappings", []) for option in mapping["options"]}
    if mapped and not {f"{value:g}" for value in values} <= mapped:
        yield f"{title}: a value without a name"
