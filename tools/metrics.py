"""Writes docs/metrics.md from the contract in the code; `--check` fails when it is not what would be written."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from storaged.host.families import HOST  # noqa: E402  # the path comes first
from storaged.metrics.calls import CALLS  # noqa: E402
from storaged.metrics.families import GUEST, REACTION_BUCKETS  # noqa: E402
from storaged.metrics.family import Family, Type  # noqa: E402

TARGET = ROOT / "docs" / "metrics.md"
INTRO = """# Metrics

Made from the tables of families in `storaged/metrics` and `storaged/host` by `make docs`; do not edit.

`storaged serve --metrics HOST:PORT` (or `unix:/path`) serves the guest's at `/metrics`; those of `storaged-host` are
served where `[serve] metrics` in its TOML says. As Prometheus text or as OpenMetrics, whichever is asked for.

Names, types and labels are a contract: they are added to, and otherwise change only with a major version. Units are
base units. All values of a label are there from the start, at 0; what is "while a job runs" is *absent* at other times.
A metric with a label `state` is 1 at the present state and 0 at the others.

No metric carries a path, an argument or the text of an error. Labels that tell guests apart (`vm`, `host`) come from
the scrape configuration: see [monitoring](monitoring.md).

A scrape reads what the daemon has published and the kernel's own accounting in memory. It waits at most 3 ms for the
latter; a disk that hangs makes the values of the filesystem those of the last scrape, nothing else.
`?name[]=NAME` asks for some alone. Beyond 16 connections at once a further one is closed unanswered.
Nothing is encrypted or asked for a password: serve them on a loopback address, a unix socket or a network you trust.
"""
ABOUT_CALLS = """## Calls to the guest

Named as gRPC servers in other languages name them. Those that hosts make all the time are there from the start, at 0,
with code `OK`; every other method and code from its first call, also the cancelled (`CANCELLED`) and those past
their deadline (`DEADLINE_EXCEEDED`). Methods that nobody has are all `unknown`.
"""
ABOUT_HOST = """## The host

Served by `storaged-host`; `pool` and `vm` are the names in its configuration. What is not known is absent, not 0.
"""
HEAD = "| metric | type | labels | there | meaning |", "|---|---|---|---|---|"


def series(family: Family) -> int:
    """How many series it has at most."""
    if family.type is Type.HISTOGRAM:
        return len(REACTION_BUCKETS) + 3
    count = 1
    for _, values in family.labels:
        count *= len(values) or 1
    return count


def row(family: Family) -> str:
    """Its line in the table."""
    labels = "<br>".join(f"`{name}`" + (f": {', '.join(values)}" if values else "") for name, values in family.labels)
    return f"| `{family.name}` | {family.type.value} | {labels} | {family.present} | {family.help} |"


def page() -> str:
    """The whole page."""
    total = sum(series(family) for family in GUEST)
    lines = [
        INTRO,
        "## The guest",
        "",
        *HEAD,
        *map(row, GUEST),
        "",
        f"At most {total} series, and those of the calls: together at most 100 in what a host does to a guest.",
        "",
        ABOUT_CALLS,
        *HEAD,
        *map(row, CALLS),
        "",
        ABOUT_HOST,
        *HEAD,
        *map(row, HOST),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            print("docs/metrics.md is not made from the present contract: run `make docs`", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
