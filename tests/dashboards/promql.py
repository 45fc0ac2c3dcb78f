"""As much of PromQL as a look at our own queries needs: which series, with which labels, in which functions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dashboards.src.model import BYTES, CALLS, COUNT, RATE, SECONDS, SHARE

_SELECTOR = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)\{(?P<matchers>[^}]*)\}(?:\[(?P<range>[^\]]+)\])?")
_MATCHER = re.compile(r'\s*(?P<label>\w+)\s*(?P<how>=~|!~|!=|=)\s*"(?P<value>[^"]*)"\s*(?:,|$)')
_GROUP = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_WORDS = frozenset({"by", "or", "and", "unless", "on", "ignoring", "without", "group_left", "group_right", "bool"})
RATED = frozenset({"rate", "irate", "increase"})


@dataclass(frozen=True, slots=True)
class Selector:
    """One series selector. `within` are the functions around it, the innermost first."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]
    range: str | None
    within: tuple[str, ...]


def selectors(expression: str) -> Iterator[Selector]:
    """Every selector in braces."""
    for found in _SELECTOR.finditer(expression):
        matchers = tuple((one["label"], one["how"], one["value"]) for one in _MATCHER.finditer(found["matchers"]))
        yield Selector(found["name"], matchers, found["range"], _around(expression, found.start()))


def _around(expression: str, at: int) -> tuple[str, ...]:
    functions, depth = [], 0
    for index in range(at - 1, -1, -1):
        if expression[index] == ")":
            depth += 1
        elif expression[index] == "(":
            depth -= 1
            if depth < 0:
                depth = 0
                before = re.sub(r"\b(?:by|without)\s*\([^)]*\)\s*$", "", expression[:index].rstrip())
                name = re.search(r"(\w+)\s*$", before)
                if name and name[1] not in _WORDS:
                    functions.append(name[1])
    return tuple(functions)


def grouped(expression: str) -> set[str]:
    """Labels named in by(...), on(...) and their like."""
    return {label.strip() for found in _GROUP.finditer(expression) for label in found[1].split(",") if label.strip()}


def unit(expression: str) -> str | None:
    """The unit of the answer, by the suffixes of what is asked for; None when it is a number of no unit we know."""
    asked = list(selectors(expression))
    first = asked[0]
    if _is_ratio(expression):
        return SHARE
    if "histogram_quantile" in first.within or first.name.endswith("_seconds_sum"):
        return SECONDS
    if "count" in first.within or " bool " in expression:
        return COUNT
    if "rate" in first.within or "irate" in first.within:
        return RATE if first.name.endswith("_bytes_total") else CALLS
    if first.name.endswith(("_bytes", "_bytes_total")):
        return BYTES
    if first.name.endswith("_ratio"):
        return SHARE
    if first.name.endswith("_seconds"):
        return SECONDS
    return COUNT


def _is_ratio(expression: str) -> bool:
    """Bytes over bytes."""
    over = re.split(r"\)\s*/\s*", expression, maxsplit=1)
    return len(over) == 2 and all("_bytes" in side for side in over)
