"""What is known of the streams we write to: terminals or not, how wide, in colour or not."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import TextIO

from storaged.ctl.show import WIDEST, Row, layout, printable


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where text for people goes. With --json that is stderr, and stdout has nothing but JSON."""

    stream: TextIO

    @property
    def interactive(self) -> bool:
        """True when somebody looks at it."""
        return self.stream.isatty()

    @property
    def width(self) -> int:
        """Columns to use."""
        return columns()

    @property
    def color(self) -> bool:
        """True when colours are wanted (no-color.org)."""
        return self.interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"

    def rows(self, rows: list[Row]) -> None:
        """Print `rows`."""
        self.text("\n".join(layout(rows, self.width, color=self.color)))

    def text(self, text: str) -> None:
        """Print one text as it is."""
        print(text, file=self.stream, flush=True)


def columns() -> int:
    """Columns of the terminal, at most WIDEST."""
    return max(min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST), 1)


def complain(message: str) -> None:
    """One line on stderr; on a terminal it is broken between words."""
    text = f"storagectl: {printable(message)}"
    if sys.stderr.isatty():
        text = textwrap.fill(text, columns(), break_on_hyphens=False)
    print(text, file=sys.stderr, flush=True)
