"""What the demo shows: live bars on a terminal, plain lines elsewhere. Fits 80 columns."""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.terminal_theme import MONOKAI
from rich.text import Text

from storaged.units import format_size

WIDTH = 80
BAR = 42


@dataclass(slots=True)
class Bar:
    """One disk: parts of `total` bytes, each with a letter for what it is."""

    name: str
    total: int
    parts: list[tuple[str, str, int]] = field(default_factory=list)  # (mark, style, bytes)
    note: str = ""


LEGEND = Text.assemble(
    ("█", "cyan"), " written  ", ("▓", "magenta"), " held by the balloon  ", ("░", "green"), " may still be written"
)


class Screen:
    """Collects lines and bars and shows them. Thread-safe enough: one writer a field."""

    def __init__(self, *, record: bool = False) -> None:
        self.console = Console(record=record, width=None if not record else WIDTH, highlight=False)
        self.live: Live | None = None
        self.bars: list[Bar] = []
        self.lines: deque[Text] = deque(maxlen=11)
        self.job = ""
        self._begun = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Live(get_renderable=self.picture, console=self.console, refresh_per_second=6, transient=True)
            self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, trace)
            self.live = None

    def scene(self, title: str) -> None:
        """A new act."""
        self._line(Text(title, style="bold"))

    def say(self, text: str, style: str = "") -> None:
        """One thing that happened."""
        self._line(Text("  " + text, style=style))

    def _line(self, line: Text) -> None:
        if self.live is None:
            seconds = time.monotonic() - self._begun
            self.console.print(Text(f"{seconds:5.1f} s  ").append_text(line), soft_wrap=True)
            return
        self.lines.append(line)
        # Above the live picture it stays readable in the terminal's history.
        self.live.console.print(line)

    def picture(self) -> RenderableType:
        """The live part: the disks, and the job that runs."""
        grid = Table.grid(padding=(0, 1))
        for bar in self.bars:
            grid.add_row(Text(bar.name, style="bold"), _drawn(bar), Text(bar.note, style="dim"))
        rows: list[RenderableType] = [Text("─" * min(self.console.width, WIDTH), style="dim"), grid, LEGEND]
        if self.job:
            rows.append(Text(self.job, style="yellow"))
        return Group(*rows)

    def table(self, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """The summary."""
        table = Table(title=title, title_justify="left", width=min(self.console.width, WIDTH))
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def save_svg(self, path: Path) -> None:
        """What was printed, as a picture that needs no font from elsewhere."""
        svg = self.console.export_svg(title="make demo", theme=MONOKAI)
        svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
        svg = re.sub(r"\s*<!-- Generated with Rich .*? -->", "", svg)
        path.write_text(svg.replace("Fira Code, monospace", "monospace"), encoding="utf-8")


def _drawn(bar: Bar) -> Text:
    text = Text()
    drawn = 0
    for mark, style, size in bar.parts:
        cells = round(BAR * size / bar.total) if bar.total else 0
        cells = min(max(cells, 1 if size > bar.total // 200 else 0), BAR - drawn)
        text.append(mark * cells, style=style)
        drawn += cells
    return text.append("·" * (BAR - drawn), style="dim")


def gib(size: int) -> str:
    """A size in few letters."""
    return format_size(size)
