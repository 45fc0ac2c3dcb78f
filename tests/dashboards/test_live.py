"""A real Prometheus scrapes real daemons under load; every query of every dashboard is asked as Grafana asks it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest

from dashboards.build import BOARDS
from tests.dashboards.grafana import faults
from tests.dashboards.lint import complaints
from tests.dashboards.live import Live, simulated, stage
from tests.dashboards.mutations import MUTATIONS, mutants
from tests.dashboards.test_lint import load
from tests.metrics.support import tool


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Three simulated guests and the host's own daemon, recorded."""
    tool("prometheus")
    directory = tmp_path_factory.mktemp("live")
    with simulated(directory) as scene, stage(directory, scene) as recorded:
        yield recorded


def test_alerts_that_are_due_can_say_what_is_the_matter(live: Live) -> None:
    due = live.prometheus.alerts()
    assert "c.d" in {alert["labels"].get("vm") for alert in due}, "some are of the host"
    said = [text for alert in due for text in alert["annotations"].values()]
    assert [text for text in said if "error expanding" in text or "<no value>" in text] == []
    for alert in due:
        with urllib.request.urlopen(alert["annotations"]["runbook_url"], timeout=10) as answer:
            page = answer.read().decode()
        assert f"<h1>{alert['labels']['alertname']}</h1>" in page
        assert "<h2>Mitigation</h2>" in page


@pytest.mark.parametrize("name", BOARDS)
def test_every_query_has_an_answer_that_makes_sense(name: str, live: Live) -> None:
    assert faults(load(name), live.prometheus, live.window) == []


@pytest.mark.parametrize("name", BOARDS)
def test_no_panel_is_empty_while_nothing_happens(name: str, live: Live) -> None:
    assert faults(load(name), live.prometheus, live.idle, idle=True) == []


def test_what_is_shown_is_true(live: Live) -> None:
    board = load("guest")
    panel = next(one for one in board["panels"] if one["title"] == "Filesystem")
    for member in live.scene.members:
        expression = (
            panel["targets"][0]["expr"].replace("$job", ".+").replace("$host", ".+").replace("$vm", member.name)
        )
        shown = live.prometheus.at(expression, live.window.end)
        assert len(shown) == 1, "one guest, and no other"
        if member is not live.scene.members[0]:
            assert float(shown[0]["values"][0][1]) == member.daemon.status().current_size


def test_broken_dashboards_are_caught(live: Live) -> None:
    caught, missed = 0, []
    for title, board in mutants({name: load(name) for name in BOARDS}):
        if complaints(board) or faults(board, live.prometheus, live.window):
            caught += 1
        else:
            missed.append(title)
    print(f"dashboards: {caught} of {caught + len(missed)} mutations caught, of {len(MUTATIONS)} kinds")
    assert missed == []


def test_queries_that_answer_wrongly_are_caught_by_asking_alone(live: Live) -> None:
    caught, missed = 0, []
    for title, board in mutants({name: load(name) for name in BOARDS}, live_only=True):
        if faults(board, live.prometheus, live.window):
            caught += 1
        else:
            missed.append(title)
    print(f"dashboards, by asking Prometheus alone: {caught} of {caught + len(missed)} mutations caught")
    assert missed == []
