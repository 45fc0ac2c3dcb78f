"""Measures a real daemon against real peers: a table on the screen, everything in build/bench.json. Needs root."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import balloon, bounds, footprint, idle, impact, prealloc, report, resize, rpc, scrape, sharing, shrink
from benchmarks.measure import Row
from lab.loop import sweep, workspace

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {
    module.SECTION: module.measure
    for module in (balloon, resize, shrink, impact, bounds, prealloc, rpc, scrape, footprint, idle, sharing)
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", choices=SECTIONS, help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="fewer runs of everything")
    parser.add_argument("--dir", type=Path, help="where the disk images lie (default: the temporary directory)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json", metavar="FILE")
    return parser.parse_args()


def main() -> int:
    """Measure what was asked for; the exit code is 0 even when a goal is missed."""
    arguments = _arguments()
    if os.geteuid():
        print("the benchmarks mount filesystems: run them as root", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleared on that way too
    sweep(arguments.dir)
    footprint.compiled()
    rows: list[Row] = []
    facts: dict[str, object] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "quick": arguments.quick}
    load = os.getloadavg()
    for name in arguments.only or SECTIONS:
        with workspace(arguments.dir) as directory:
            facts["machine"] = report.machine(directory)
            rows += SECTIONS[name](directory, quick=arguments.quick)
    facts["load_average"] = {"before": load, "after": os.getloadavg()}
    report.show(rows)
    report.write(arguments.json, rows, facts)
    shown = arguments.json.relative_to(ROOT) if arguments.json.is_relative_to(ROOT) else arguments.json
    print(f"everything: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
