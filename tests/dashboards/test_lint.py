"""The dashboards are what their sources make, and nothing can be said against them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dashboards.build import BOARDS, TARGET, TEXTS, wanted
from lab.prometheus import ROOT
from tests.dashboards.lint import Json, complaints, grid, panels, schema
from tests.dashboards.test_alerts import alerts


def load(name: str) -> Json:
    """A committed dashboard."""
    board: Json = json.loads((TARGET / f"{name}.json").read_text(encoding="utf-8"))
    return board


def test_they_are_what_the_sources_make() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "dashboards" / "build.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in TARGET.glob("*.json")} == {*BOARDS, TEXTS}


@pytest.mark.parametrize("name", BOARDS)
def test_nothing_can_be_said_against_it(name: str) -> None:
    assert complaints(load(name)) == []


def test_every_alert_can_be_seen_on_a_dashboard() -> None:
    linked = {
        link["title"].removeprefix("Runbook: ")
        for name in BOARDS
        for panel in panels(load(name))
        for link in panel.get("links", [])
    }
    assert linked == set(alerts())


def test_the_runbooks_are_beside_the_dashboards() -> None:
    board = load(TEXTS)
    assert [*schema(board), *grid(board)] == []
    shown = {panel["title"]: panel["options"]["content"] for panel in board["panels"]}
    assert set(shown) == set(alerts())
    for name, text in shown.items():
        page = (ROOT / "docs" / "runbooks" / f"{name}.md").read_text(encoding="utf-8")
        assert page == f"# {name}\n\n{text}\n"


def test_runbooks_that_are_published_elsewhere_are_linked_there() -> None:
    made = wanted("https://wiki.example.org/storaged", TARGET)
    assert f"https://wiki.example.org/storaged/{next(iter(alerts()))}.md" in made[TARGET / "guest.json"]
