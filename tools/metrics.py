"""Writes docs/metrics.md from the contract in the code; `--check` fails when it is not what would be written."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from storaged.metrics.families import GUEST, REACTION_BUCKETS, Family, Type  # noqa: E402  # the path comes first

TARGET = ROOT / "docs" / "metrics.md"
INTRO = """# Metrics of the guest

Made from `storaged/metrics/families.py` by `make docs`; do not edit.

`storaged serve --metrics HOST:PORT` (or `unix:/path`) serves them at `/metrics`, as Prometheus text or as OpenMetrics,
whichever is asked for. Names, types and labels are a contract: they are added to, and otherwise change only with a
major version. Units are base units. All values of a label are there from the start, at 0; what is "while a job runs"
is *absent* at other times. A metric with a label `state` is 1 at the present state and 0 at the others.

No metric carries a path, an argument or the text of an error. Labels that tell guests apart (`vm`, `host`) come from
the scrape configuration: see [monitoring](monitoring.md).

A scrape reads what the daemon has published and the kernel's own accounting in memory. It waits at most 3 ms for the
latter; a disk that hangs makes the values of the filesystem those of the last scrape, nothing else.
Nothing is encrypted or asked for a password: serve them on a loopback address, a unix socket or a network you trust.
"""
CALLS = """## Calls

Named as gRPC servers in other languages name them. Labels: `grpc_type`, `grpc_service`, `grpc_method`.

| metric | type | more labels | meaning |
|---|---|---|---|
| `grpc_server_started_total` | counter | | Calls that began |
| `grpc_server_handled_total` | counter | `grpc_code` | Calls that ended |
| `grpc_server_handling_seconds` | histogram | | How long they took, of those that hosts call all the time |
"""


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
        "| metric | type | labels | there | meaning |",
        "|---|---|---|---|---|",
        *map(row, GUEST),
        "",
        f"At most {total} series altogether.",
        "",
        CALLS,
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
