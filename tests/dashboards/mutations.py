"""Dashboards broken on purpose, in the ways in which dashboards break."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.dashboards.lint import Json, panels, variables

Change = Callable[[Json, Json, Json], bool | None]
"""Breaks (board, panel, first target); False when there is nothing to break in it."""
A_KIND_TOUCHES = 3
"""Panels of each dashboard that each kind breaks, one at a time."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """`live`: the answers alone must give it away."""

    name: str
    change: Change
    live: bool = False


def _swap(old: str, new: str, count: int = 1) -> Change:
    def change(_: Json, __: Json, target: Json) -> bool:
        before = target["expr"]
        target["expr"] = re.sub(old, new, before, count=count)
        return bool(target["expr"] != before)

    return change


def _set(key: str, value: Any) -> Change:
    def change(_: Json, panel: Json, __: Json) -> None:
        panel[key] = value

    return change


def _target(key: str, value: Any) -> Change:
    def change(_: Json, __: Json, target: Json) -> None:
        target[key] = value

    return change


def _default(key: str, value: Any) -> Change:
    def change(_: Json, panel: Json, __: Json) -> None:
        panel["fieldConfig"]["defaults"][key] = value

    return change


def _wrong_unit(_: Json, panel: Json, __: Json) -> bool:
    if panel["type"] == "table":
        return False
    defaults = panel["fieldConfig"]["defaults"]
    defaults["unit"] = "s" if defaults["unit"] != "s" else "bytes"
    return True


def _moved(_: Json, panel: Json, __: Json) -> None:
    panel["gridPos"]["y"] += 1


def _legend(_: Json, panel: Json, target: Json) -> bool:
    target["legendFormat"] = "{{device}}"
    return bool(panel["type"] != "table")


def _same_id(board: Json, panel: Json, _: Json) -> None:
    panel["id"] = board["panels"][0]["id"]


def _runbook(_: Json, panel: Json, __: Json) -> bool:
    for link in panel.get("links", []):
        link["url"] += "x"
    return bool(panel.get("links"))


def _variable(board: Json, _: Json, __: Json) -> None:
    one = next(one for one in variables(board).values() if one["type"] == "query")
    one["query"]["query"] = "label_values(storaged_no_such_thing, job)"


def _default_steps(_: Json, panel: Json, __: Json) -> None:
    steps = [{"color": "green", "value": None}, {"color": "red", "value": 80}]
    panel["fieldConfig"]["defaults"]["thresholds"] = {"mode": "absolute", "steps": steps}


def _ungrouped(_: Json, panel: Json, target: Json) -> bool:
    before = target["expr"]
    target["expr"] = re.sub(r" by \([^)]*\)", "", before, count=1)
    return bool(target["expr"] != before) and ("{{" in target["legendFormat"] or panel["type"] == "table")


def _not_finite(_: Json, __: Json, target: Json) -> None:
    target["expr"] = f"({target['expr']}) / 0"


def _unmapped(_: Json, panel: Json, target: Json) -> bool:
    target["expr"] = f"({target['expr']}) + 50"
    return bool(panel["fieldConfig"]["defaults"].get("mappings"))


def _everybody(_: Json, panel: Json, target: Json) -> bool:
    before = target["expr"]
    target["expr"] = re.sub(r', vm=~"\$vm"', "", before)
    return bool(target["expr"] != before) and panel["type"] == "stat" and "sum" not in before


MUTATIONS = (
    Mutation("a metric that does not exist", _swap(r"(storaged|grpc_server)_\w+", r"\g<0>x", 0), live=True),
    Mutation("a label value that does not exist", _swap(r'host=~"[^"]*"', 'host="x"', 0), live=True),
    Mutation("a label that does not exist", _swap(r"\{", '{zone="x", ')),
    Mutation("a query that is no PromQL", _swap(r"\}", "}}"), live=True),
    Mutation("a counter without a rate", _swap(r"rate\((.*?)\[\$__rate_interval\]\)", r"(\1)")),
    Mutation("a rate of a gauge", _swap(r"storaged_balloon_size_bytes\{[^}]*\}", r"rate(\g<0>[$__rate_interval])")),
    Mutation("a fixed range", _swap(r"\[\$__rate_interval\]", "[5m]")),
    Mutation("a range too short for any rate", _swap(r"\[\$__rate_interval\]", "[900ms]"), live=True),
    Mutation("a variable that does not exist", _swap(r"\$host", "$hosts")),
    Mutation("labels lost in a sum", _ungrouped, live=True),
    Mutation("not finite", _not_finite, live=True),
    Mutation("grouped by what is not there", _swap(r" by \(", " by (zone, ")),
    Mutation("a legend of what is not there", _legend, live=True),
    Mutation("a wrong unit", _wrong_unit),
    Mutation("a state without a name", _unmapped, live=True),
    Mutation("all guests where one is shown", _everybody, live=True),
    Mutation("no unit", _default("unit", "")),
    Mutation("Grafana's default thresholds", _default_steps),
    Mutation("no title", _set("title", "")),
    Mutation("no description", _set("description", "")),
    Mutation("a fixed data source", _set("datasource", {"type": "prometheus", "uid": "abc"})),
    Mutation("a key that Grafana does not know", _set("colour", "red")),
    Mutation("a kind of panel that has no such options", _set("options", {"sparkle": [1]})),
    Mutation("an id twice", _same_id),
    Mutation("a hole in the grid", _moved),
    Mutation("a runbook that is not there", _runbook),
    Mutation("a variable without values", _variable, live=True),
    Mutation("no legend", _target("legendFormat", "")),
    Mutation("a query over time for one number, or the other way round", _target("range", "both")),
)


def mutants(boards: dict[str, Json], *, live_only: bool = False) -> Iterator[tuple[str, Json]]:
    """(what is broken where, the broken dashboard)."""
    for mutation in MUTATIONS:
        if live_only and not mutation.live:
            continue
        for name, board in boards.items():
            touched = 0
            for index, panel in enumerate(panels(board)):
                broken = copy.deepcopy(board)
                victim = panels(broken)[index]
                if touched < A_KIND_TOUCHES and mutation.change(broken, victim, victim["targets"][0]) is not False:
                    touched += 1
                    yield f"{name}, {panel['title']}: {mutation.name}", broken
