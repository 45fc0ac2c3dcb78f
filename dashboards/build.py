"""Writes the dashboards' JSON and the runbooks' pages; `--check` fails when it is not what would be written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dashboards.src import fleet, guest, pool, runbooks  # noqa: E402  # the path comes first
from dashboards.src.model import Board  # noqa: E402
from dashboards.src.render import render, render_runbooks  # noqa: E402

TARGET = ROOT / "dashboards" / "storaged"
PAGES = ROOT / "packaging" / "prometheus" / "consoles" / "storaged"
BOARDS: dict[str, Board] = {"fleet": fleet.BOARD, "guest": guest.BOARD, "pool": pool.BOARD}


TEXTS = "runbooks"
"""The dashboard that asks for nothing."""


def wanted(published: str = "", to: Path = TARGET, pages: Path = PAGES) -> dict[Path, str]:
    """Every file and what belongs into it."""
    files = {to / f"{name}.json": render(board, published) for name, board in BOARDS.items()}
    files[to / f"{TEXTS}.json"] = render_runbooks()
    return files | {pages / f"{name}.html": runbooks.html_page(name) for name in runbooks.names()}


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    parser.add_argument("--runbooks", default="", metavar="URL", help="where docs/runbooks is published, if it is")
    arguments = parser.parse_args()
    files = wanted(arguments.runbooks.rstrip("/"))
    stale = [path for path in PAGES.glob("*") if path not in files]
    for path, text in files.items():
        if arguments.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale and arguments.check:
        names = ", ".join(path.name for path in stale)
        print(
            f"dashboards: {names} differ from dashboards/src and docs/runbooks: run `make dashboards`", file=sys.stderr
        )
        return 1
    for path in stale:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
