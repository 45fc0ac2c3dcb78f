"""Writes the dashboards' JSON; `--check` fails when it is not what would be written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dashboards.src import fleet, guest, pool  # noqa: E402  # the path comes first
from dashboards.src.model import RUNBOOKS, Board  # noqa: E402
from dashboards.src.render import render  # noqa: E402

TARGET = ROOT / "dashboards" / "storaged"
BOARDS: dict[str, Board] = {"fleet": fleet.BOARD, "guest": guest.BOARD, "pool": pool.BOARD}


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    parser.add_argument("--runbooks", default=RUNBOOKS, metavar="URL", help="where docs/runbooks is published")
    parser.add_argument("--to", type=Path, default=TARGET, metavar="DIR", help="where the files go")
    arguments = parser.parse_args()
    stale = []
    for name, board in BOARDS.items():
        path, text = arguments.to / f"{name}.json", render(board, arguments.runbooks.rstrip("/"))
        if arguments.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path.name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"dashboards: {', '.join(stale)} differ from dashboards/src: run `make dashboards`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
