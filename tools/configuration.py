"""Writes docs/configuration.md from the settings in the code; `--check` fails when it is not what would be written."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from storaged import tables  # noqa: E402  # the path comes first
from storaged.config import table_types  # noqa: E402

TARGET = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Settings

Made from the code by `make docs`; do not edit.

`storaged serve --config FILE` reads TOML. Every key is checked and an unknown one refused, by name, before anything
starts; the command line overrides the file. Sizes are bytes or text such as `"2GiB"`, times are seconds.

On SIGHUP (`systemctl reload storaged`) the file is read again. Keys marked ↻ are in force at once; of the others the
log says that they wait for a restart. A file that is refused then changes nothing.

All that can be said, with its default:
"""


def example() -> str:
    """A file that says what is so anyway."""
    lines = []
    for name, table in table_types().items():
        lines.append(f"[{name}]")
        for key in tables.keys(table):
            said = f"{key.name} = {tables.toml(key, key.default)}"
            # Without a default there is nothing to write: TOML has no word for nothing.
            lines.append(said if key.default is not None else f"# {key.name} =")
        lines.append("")
    return "\n".join(lines)


def section(name: str, table: type) -> str:
    """One table, a row for each key."""
    about = (table.__doc__ or "").partition("\n")[0]
    lines = [f"## [{name}]", "", about, "", "| key | default | accepted | |", "|---|---|---|---|"]
    for key in tables.keys(table):
        default = "" if key.default is None else f"`{tables.toml(key, key.default)}`"
        mark = " ↻" if key.reload else ""
        cells = (f"`{key.name}`{mark}", default, key.accepts, key.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, f"```toml\n{example()}```", *(section(*item) for item in table_types().items())]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            print("docs/configuration.md is not made from the present settings: run `make docs`", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
