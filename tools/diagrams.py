"""Writes docs/states.md from the tables in the code; `--check` fails when it is not what would be written."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from storaged.core.balloon import ON_ENTER  # noqa: E402  # the path comes first
from storaged.core.model import Config  # noqa: E402
from storaged.core.pressure import LEVEL_AFTER, Zone  # noqa: E402
from storaged.core.state import BALLOON_AFTER  # noqa: E402  # the path comes first
from storaged.host.saga import PATH, WORK  # noqa: E402
from storaged.host.saga_model import Direction, Saga, Stage  # noqa: E402
from storaged.resize.job import TRANSITIONS  # noqa: E402
from storaged.units import format_size  # noqa: E402

TARGET = ROOT / "docs" / "states.md"


def zones(config: Config) -> list[tuple[Zone, str]]:
    """What each zone means, with the numbers in force by default."""
    return [
        (Zone.SCARCE, f"free ≤ {format_size(config.critical_enter)}"),
        (Zone.SCARCE_EDGE, f"below {format_size(config.critical_leave)}"),
        (Zone.TIGHT, f"free ≤ {format_size(config.low_enter)}"),
        (Zone.TIGHT_EDGE, f"below {format_size(config.low_leave)}"),
        (Zone.AMPLE, f"{format_size(config.low_leave)} and more"),
    ]


def pressure() -> list[str]:
    """The pressure table, and what entering a level does."""
    named = zones(Config())
    lines = ["| level now | " + " | ".join(f"{zone.value}<br>{text}" for zone, text in named) + " |"]
    lines.append("|---" * (len(named) + 1) + "|")
    for level, row in LEVEL_AFTER.items():
        lines.append(f"| **{level.name}** | " + " | ".join(row[zone].name for zone, _ in named) + " |")
    lines += ["", "| on entering | in this order |", "|---|---|"]
    lines += [f"| {level.name} | {', '.join(actions)} |" for level, actions in ON_ENTER.items()]
    lines += ["", "```mermaid", "stateDiagram-v2", "    [*] --> NORMAL"]
    for level, row in LEVEL_AFTER.items():
        for other in sorted({after for after in row.values() if after is not level}):
            causes = [zone.value for zone, _ in named if row[zone] is other]
            settle = ", settled" if other < level else ""
            lines.append(f"    {level.name} --> {other.name}: {' or '.join(causes)}{settle}")
    return [*lines, "```"]


def job() -> list[str]:
    """The job table as a diagram."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> REQUESTED"]
    for state, row in TRANSITIONS.items():
        for after in dict.fromkeys(row.values()):
            if after is not state:
                signals = [signal.value for signal, to in row.items() if to is after]
                lines.append(f"    {state.name} --> {after.name}: {' / '.join(signals)}")
        if not row:
            lines.append(f"    {state.name} --> [*]")
    return [*lines, "```"]


def balloon() -> list[str]:
    """The balloon table as a diagram; every row is the same."""
    row = next(iter(BALLOON_AFTER.values()))
    lines = ["| signal | state after it |", "|---|---|"]
    return [*lines, *(f"| {signal.value} | {state.name} |" for signal, state in row.items())]


def saga() -> list[str]:
    """The ways of a resize from end to end, and the work of each stage."""
    some = Saga("", "", 0, 0.0)
    lines = ["| direction | stages in this order, and the work of each |", "|---|---|"]
    for direction in (Direction.GROW, Direction.SHRINK):
        stages = [stage for stage in PATH[direction] if (direction, stage) in WORK] + [Stage.RESTORING]
        works = [f"{stage.value}: {type(WORK[direction, stage](some)).__name__}" for stage in stages]
        lines.append(f"| {direction.value} | {' · '.join(works[:-1])} · (on the way out) {works[-1]} |")
    return lines


def page() -> str:
    """The whole page."""
    parts = [
        "# The state tables",
        "Made from the tables in the code by `make docs`; do not edit.",
        "## Host pressure (`storaged/core/pressure.py`)",
        (
            "The host's free bytes fall into a zone. A worse level counts at once, a better one after it has lasted for"
            f" {Config().settle_s:g} s. A host that names a state is never believed to be better off than it says."
        ),
        "\n".join(pressure()),
        "## The balloon (`storaged/core/state.py`)",
        "The newest signal wins, whatever the state.",
        "\n".join(balloon()),
        "## A resize job (`storaged/resize/job.py`)",
        "\n".join(job()),
        "## A resize from end to end (`storaged/host/saga.py`)",
        "Both begin with asking for all sizes. See [resize.md](resize.md).",
        "\n".join(saga()),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            print("docs/states.md is not made from the present tables: run `make docs`", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
