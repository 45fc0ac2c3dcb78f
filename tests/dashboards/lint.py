"""What can be said against a dashboard without running it. Each rule yields sentences; none is the aim."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.build import BOARDS
from dashboards.src import runbooks
from dashboards.src.series import KNOWN
from tests.dashboards import promql

Json = dict[str, Any]
Complaints = Iterator[str]
register_default_plugins()  # so that options of each kind of panel are read by their own types
DEFAULT_STEPS = [{"color": "green", "value": None}, {"color": "red", "value": 80}]
NARROWED = {"storaged-fleet": {"host"}, "storaged-guest": {"job", "host", "vm"}, "storaged-pool": {"job", "host"}}
GRAFANAS = {"__rate_interval", "__range", "__interval", "__url_time_range", "__data"}


def panels(board: Json) -> list[Json]:
    """All that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def targets(board: Json) -> Iterator[tuple[Json, Json]]:
    """(panel, target)."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield panel, target


def variables(board: Json) -> dict[str, Json]:
    """By name."""
    return {one["name"]: one for one in board["templating"]["list"]}


def schema(board: Json) -> Complaints:
    """Grafana's own types know every key: nothing is dropped on the way through them, and nothing fails."""
    try:
        through = json.loads(json.dumps(Dashboard.from_json(json.loads(json.dumps(board))), cls=JSONEncoder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield f"Grafana's types do not take it: {error!r}"
        return
    yield from _dropped(board, through, "")


def _dropped(ours: Any, theirs: Any, where: str) -> Complaints:
    if isinstance(ours, dict):
        for key, value in ours.items():
            if not isinstance(theirs, dict) or (key not in theirs and value is not None):
                yield f"{where}.{key} is not known to Grafana"
            elif key in theirs:
                yield from _dropped(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        if not isinstance(theirs, list) or len(ours) != len(theirs):
            yield f"{where} is not what Grafana reads"
        else:
            for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                yield from _dropped(one, other, f"{where}[{index}]")


def identity(board: Json) -> Complaints:
    """Names and numbers that others rely on."""
    if board.get("uid") not in {one.uid for one in BOARDS.values()}:
        yield f"uid {board.get('uid')} is not one of ours"
    if not board.get("title") or not board.get("description") or "storaged" not in board.get("tags", []):
        yield "title, description and the tag storaged are needed"
    if board.get("id") is not None:
        yield "an id belongs to one Grafana alone"
    numbers = [panel.get("id") for panel in board["panels"]]
    if None in numbers or len(set(numbers)) != len(numbers):
        yield "panel ids must be there, and unique"
    titles = [panel.get("title") for panel in board["panels"]]
    if len(set(titles) - {None, ""}) != len(titles):
        yield "panel titles must be there, and unique"
    if not re.fullmatch(r"[1-9]\d*[sm]", board.get("refresh") or "") or board["time"]["to"] != "now":
        yield "it must refresh, and end now"


def looks(board: Json) -> Complaints:
    """What a person sees."""
    for panel in panels(board):
        defaults = panel["fieldConfig"]["defaults"]
        if not panel.get("description"):
            yield f"{panel.get('title')}: no description"
        if not defaults.get("unit"):
            yield f"{panel.get('title')}: no unit"
        steps = (defaults.get("thresholds") or {}).get("steps")
        if not steps or steps == DEFAULT_STEPS:
            yield f"{panel.get('title')}: thresholds are Grafana's default"
        elif steps[0]["value"] is not None or sorted(s["value"] for s in steps[1:]) != [s["value"] for s in steps[1:]]:
            yield f"{panel.get('title')}: thresholds are out of order"


def grid(board: Json) -> Complaints:
    """No holes, nothing on top of another."""
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        spot = panel["gridPos"]
        for x in range(spot["x"], spot["x"] + spot["w"]):
            for y in range(spot["y"], spot["y"] + spot["h"]):
                if (x, y) in taken or x >= 24:
                    yield f"{panel.get('title')}: lies on {taken.get((x, y), 'the edge')}"
                    return
                taken[x, y] = str(panel.get("title"))
    bottom = max(y for _, y in taken) + 1
    if len(taken) != 24 * bottom:
        yield "the grid has a hole"


def sources(board: Json) -> Complaints:
    """Every panel and variable asks the source that was chosen."""
    if variables(board).get("datasource", {}).get("type") != "datasource":
        yield "no variable for the data source"
    asking = [*panels(board), *(one for one in variables(board).values() if one["type"] == "query")]
    for one in asking:
        if one.get("datasource") != {"type": "prometheus", "uid": "${datasource}"}:
            yield f"{one.get('title') or one.get('name')}: asks a fixed data source"


def queries(board: Json) -> Complaints:
    """Series, labels, ranges and rates."""
    for panel, target in targets(board):
        title, expression = panel.get("title"), target.get("expr", "")
        asked = list(promql.selectors(expression))
        if not asked:
            yield f"{title}: asks for nothing"
            continue
        allowed: set[str] = set()
        for one in asked:
            known = KNOWN.get(one.name)
            if known is None:
                yield f"{title}: {one.name} does not exist"
                continue
            allowed |= known.labels
            for label, _, _ in one.matchers:
                if label not in known.labels:
                    yield f"{title}: {one.name} has no label {label}"
            yield from _rated(str(title), one, counter=known.counter)
            narrowed = {label for label, how, value in one.matchers if how == "=~" and value.startswith("$")}
            if missing := NARROWED.get(board["uid"], set()) - narrowed:
                yield f"{title}: not narrowed by {', '.join(sorted(missing))}"
        for label in promql.grouped(expression) - allowed:
            yield f"{title}: groups by {label}, which is not there"
        if re.search(r"\[\d", expression):
            yield f"{title}: a fixed range"
        yield from _units(panel, target)


def _rated(title: str, one: promql.Selector, *, counter: bool) -> Complaints:
    inside = bool(promql.RATED & set(one.within)) and one.range is not None
    if counter and not inside:
        yield f"{title}: {one.name} is a counter; ask for its rate"
    if not counter and inside:
        yield f"{title}: {one.name} is no counter; it has no rate"


def _units(panel: Json, target: Json) -> Complaints:
    defaults = panel["fieldConfig"]["defaults"]
    shown = defaults.get("unit")
    if panel["type"] == "table":
        for override in panel["fieldConfig"]["overrides"]:
            if override["matcher"]["options"] == target["legendFormat"]:
                shown = next((p["value"] for p in override["properties"] if p["id"] == "unit"), shown)
    meant = promql.unit(target["expr"])
    if shown != meant:
        yield f"{panel.get('title')}: shown as {shown}, but it is {meant}"


def asks(board: Json) -> Complaints:
    """Ask at once where one number is shown, over time where lines are; every query has its own letter."""
    for panel in panels(board):
        at_once = panel["type"] in {"stat", "table"}
        letters = [target.get("refId") for target in panel["targets"]]
        if len(set(letters)) != len(letters):
            yield f"{panel.get('title')}: two queries of one name"
        for target in panel["targets"]:
            if bool(target.get("instant")) is not at_once or bool(target.get("range")) is at_once:
                yield f"{panel.get('title')}: asks for the wrong kind of answer"
            if (target.get("format") == "table") is not (panel["type"] == "table"):
                yield f"{panel.get('title')}: asks for the wrong format"
            if not target.get("legendFormat"):
                yield f"{panel.get('title')}: lines without a name"


def chosen(board: Json) -> Complaints:
    """Variables are used, and all that is used is there."""
    there = set(variables(board))
    text = json.dumps(board)
    used = set(re.findall(r"\$\{?(\w+)", text)) - GRAFANAS - {"__all"}
    for name in sorted(used - there):
        yield f"${name} is nowhere to be chosen"
    for name in sorted(there - used):
        yield f"${name} is chosen for nothing"
    for one in variables(board).values():
        if one["type"] == "query" and not (one.get("includeAll") and one.get("allValue")) and one["name"] != "vm":
            yield f"${one['name']}: All is not offered"


def links(board: Json) -> Complaints:
    """Everything that can be clicked leads somewhere."""
    uids = {*(one.uid for one in BOARDS.values()), runbooks.UID}
    for uid in re.findall(r'"/d/([^?"]+)', json.dumps(board)):
        if uid not in uids:
            yield f"/d/{uid} leads nowhere"
    if not any(link["type"] == "dashboards" and link["tags"] == ["storaged"] for link in board["links"]):
        yield "no way to the other dashboards"
    shown = {one["title"]: one["id"] for one in runbooks.panels()}
    for panel in panels(board):
        for link in panel.get("links", []):
            name = link["title"].removeprefix("Runbook: ")
            if name not in shown or link["url"] != f"/d/{runbooks.UID}?viewPanel={shown[name]}":
                yield f"{panel.get('title')}: {link['url']} is no runbook of {name}"


RULES: tuple[Callable[[Json], Complaints], ...] = (
    schema,
    identity,
    looks,
    grid,
    sources,
    queries,
    asks,
    chosen,
    links,
)


def complaints(board: Json) -> list[str]:
    """All of them."""
    return [sentence for rule in RULES for sentence in rule(board)]
