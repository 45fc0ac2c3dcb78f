"""The table on the screen, and everything as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, spread
from lab.loop import run
from storaged import __version__

WIDTH = 80
_PACKAGES = ("grpcio", "protobuf", "btrfs", "btrfsutil")


def machine(directory: Path) -> dict[str, Any]:
    """What the figures were measured on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "disks_on": run("stat", "-f", "-c", "%T", directory),
        "python": platform.python_version(),
        "btrfs_progs": run("btrfs", "--version").rpartition(" ")[2],
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "storaged": __version__,
    }


def show(rows: Sequence[Row]) -> None:
    """Print the table; a `~` stands at rows whose samples lie far apart."""
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            print(f"\n{section:<40}{'storaged':>11}{'peer':>11}{'ratio':>7}  goal")
        peer = "" if row.peer_value is None else _number(row.peer_value, row.unit)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        mark = "~" if row.noisy else " "
        print(f"{mark}{row.name:<39.39}{_number(row.value, row.unit):>11}{peer:>11}{ratio:>7}  {_goal(row)}".rstrip())
    missed = [row for row in rows if row.met is False]
    print("\nratio: storaged / peer; ~ the middle half of the samples spans over 25 %")
    if missed:
        print("goals missed:", "; ".join(f"{row.section}: {row.name}" for row in missed))
    else:
        print("all goals that were measured are met")


def _number(value: float, unit: str) -> str:
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} {unit}".strip()


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    limit = f"{row.goal.limit:g}" + ("x" if row.goal.of_ratio else "")
    return limit + {True: " ok", False: " MISS", None: ""}[row.met]


def write(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Everything, with all samples."""
    document = {
        **facts,
        "rows": [
            {
                "section": row.section,
                "name": row.name,
                "unit": row.unit,
                "median": row.value,
                "peer": row.peer_name,
                "peer_median": row.peer_value,
                "best": min(row.ours),
                "peer_best": min(row.peer, default=None),
                "ratio": row.ratio,
                "goal": None
                if row.goal is None
                else {"at_most": row.goal.limit, "of": "ratio" if row.goal.of_ratio else "median", "met": row.met},
                "spread": spread(row.ours),
                "peer_spread": spread(row.peer),
                "facts": row.facts,
                "samples": row.ours,
                "peer_samples": row.peer,
            }
            for row in rows
        ],
        "goals_met": all(row.met is not False for row in rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
