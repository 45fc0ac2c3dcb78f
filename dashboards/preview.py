"""Draws the dashboards with Grafana's own widgets in a real browser, from a live run; pictures in docs/img.

Needs prometheus, node with npm, and chromium. Fetches 450 MB of npm packages into build/preview the first time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dashboards.build import BOARDS, TARGET  # noqa: E402  # the path comes first
from tests.conftest import why_no_btrfs  # noqa: E402
from tests.dashboards.grafana import Window, choices, fill  # noqa: E402
from tests.dashboards.live import Live, real, simulated, stage  # noqa: E402

SOURCES = ROOT / "dashboards" / "preview"
MODULES = ROOT / "build" / "preview"
LONGER_S = 49.0


def answers(board: dict[str, Any], live: Live) -> dict[str, Any]:
    """What every panel's queries answer, with everything chosen."""
    window: Window = live.window
    offered, wrong = choices(board, live.prometheus)
    if wrong:
        raise SystemExit("\n".join(wrong))
    found: dict[str, Any] = {}
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            expression = window.fill(fill(target["expr"], offered, board, everything=True))
            if target["instant"]:
                series = live.prometheus.at(expression, window.end)
            else:
                series = live.prometheus.over(expression, window.start, window.end, window.step)
            found.setdefault(str(panel["id"]), {})[target["refId"]] = series
    return {"board": board, "answers": found, "start": window.start, "end": window.end}


def main() -> int:
    """0 when every page was drawn without an error or an empty panel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "img", metavar="DIR", help="where the pictures go")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if browser is None or missing:
        print(f"preview: needs {', '.join([*missing, *([] if browser else ['chromium'])])}", file=sys.stderr)
        return 2
    MODULES.mkdir(parents=True, exist_ok=True)
    for path in SOURCES.iterdir():
        shutil.copy(path, MODULES)
    if not (MODULES / "node_modules").is_dir():
        print("preview: npm fetches Grafana's widgets (450 MB)")
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=MODULES, check=True)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as cleanup:
        work = Path(directory) / "work"
        work.mkdir()
        reason = why_no_btrfs()
        if reason:
            print(f"preview: simulated guests, because {reason}")
        scene = cleanup.enter_context(simulated(Path(directory)) if reason else real())
        with stage(Path(directory), scene, run_s=LONGER_S) as live:
            for name in BOARDS:
                board = json.loads((TARGET / f"{name}.json").read_text(encoding="utf-8"))
                path = work / f"dashboard-{name}.json"
                path.write_text(json.dumps(answers(board, live)), encoding="utf-8")
        return subprocess.run(["node", MODULES / "shoot.mjs", browser, work, arguments.to], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
