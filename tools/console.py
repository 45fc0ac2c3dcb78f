"""Takes the pictures of the console for the docs, from a simulated host: light, dark, and a phone's width."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Page, ViewportSize  # noqa: E402  # the path comes first

from lab.browser import browser  # noqa: E402
from lab.simulated import SimulatedHost  # noqa: E402

TARGET = ROOT / "docs" / "img"
DESK, PHONE = ViewportSize(width=1200, height=1000), ViewportSize(width=390, height=844)
SHOTS: tuple[tuple[str, Literal["light", "dark"], ViewportSize], ...] = (
    ("console-light", "light", DESK),
    ("console-dark", "dark", DESK),
    ("console-phone", "light", PHONE),
)


def ready(page: Page, url: str, history_s: float) -> None:
    """A page with a history, one guest's slider open, another's resize running."""
    page.goto(url)
    page.get_by_role("heading", name="web", exact=True).wait_for()
    time.sleep(history_s)
    page.get_by_text("Resize mail").click()
    slider = page.get_by_role("slider")
    slider.first.focus()
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
    db = page.get_by_role("article", name="db")
    if db.get_by_role("progressbar").count() == 0:
        page.get_by_text("Resize db").click()
        db.get_by_role("slider").focus()
        page.keyboard.press("Home")
        db.get_by_role("button").click()
    db.get_by_role("progressbar").wait_for()
    page.mouse.move(0, 0)
    time.sleep(4)


def main() -> None:
    """Take them all."""
    with tempfile.TemporaryDirectory() as directory, SimulatedHost(Path(directory)) as host, browser() as chromium:
        for number, (name, scheme, viewport) in enumerate(SHOTS):
            scale = 2 if viewport is PHONE else 1
            context = chromium.new_context(color_scheme=scheme, viewport=viewport, device_scale_factor=scale)
            page = context.new_page()
            ready(page, host.link, 40 if number == 0 else 1)
            page.screenshot(path=TARGET / f"{name}.png", full_page=viewport is DESK)
            context.close()


if __name__ == "__main__":
    main()
