"""Alerts fire when they should and only then; each has a runbook; the examples beside them are valid."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.src.series import KNOWN
from lab.prometheus import ROOT
from tests.dashboards.alert_cases import CASES, document
from tests.metrics.support import promtool, tool

RULES = ROOT / "packaging" / "prometheus"
BOOKS = ROOT / "docs" / "runbooks"
PARTS = ("Meaning", "Impact", "Diagnosis", "Mitigation")


def alerts() -> dict[str, dict[str, Any]]:
    """By name."""
    groups = yaml.safe_load((RULES / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def prepare(directory: Path, alerts_text: str, about: str = "") -> str:
    """The cases, or those about one alert, and rules beside them; the file for promtool."""
    directory.mkdir(exist_ok=True)
    shutil.copy(RULES / "rules.yml", directory)
    (directory / "alerts.yml").write_text(alerts_text, encoding="utf-8")
    cases = tuple(case for case in CASES if about in ("", case.about))
    (directory / "test.yml").write_text(document(cases), encoding="utf-8")
    return str(directory / "test.yml")


def test_every_case_holds(tmp_path: Path) -> None:
    done = promtool("test", "rules", prepare(tmp_path, (RULES / "alerts.yml").read_text(encoding="utf-8")))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_to_fire_and_to_be_quiet() -> None:
    assert {case.about for case in CASES if case.fires} == set(alerts())
    assert {case.about for case in CASES if not case.fires} == set(alerts())


def _never(rule: dict[str, Any]) -> None:
    rule["expr"] = f"({rule['expr']}) and on() vector(0) > 1"


def _sooner(rule: dict[str, Any]) -> None:
    rule["for"] = "0s"


def _later(rule: dict[str, Any]) -> None:
    rule["for"] = "2h"


def _always(rule: dict[str, Any]) -> None:
    rule["expr"] = "up * 0 == 0"


def _other_way(rule: dict[str, Any]) -> None:
    swapped = {">": "<", "<": ">", "==": "!="}
    rule["expr"] = re.sub(r"==|<=|>=|[<>]", lambda found: swapped.get(found[0], found[0]), rule["expr"], count=1)


def test_broken_alerts_are_caught(tmp_path: Path) -> None:
    whole = (RULES / "alerts.yml").read_text(encoding="utf-8")
    mutations: tuple[Callable[[dict[str, Any]], None], ...] = (_never, _later, _always, _other_way, _sooner)
    mutants = {}
    for index, (name, rule) in enumerate(alerts().items()):
        for mutate in mutations:
            if mutate is _sooner and "for" not in rule:
                continue
            broken = yaml.safe_load(whole)
            mutate(broken["groups"][0]["rules"][index])
            title = f"{name}{mutate.__name__}"
            mutants[prepare(tmp_path / title, yaml.safe_dump(broken), name)] = title
    said = promtool("test", "rules", *mutants).stdout
    fine = {part.split()[0] for part in said.split("Unit Testing:  ")[1:] if "SUCCESS" in part}
    missed = {title for path, title in mutants.items() if path in fine}
    print(f"alerts: {len(mutants) - len(missed)} of {len(mutants)} mutations caught")
    assert len(said.split("Unit Testing:  ")) == len(mutants) + 1
    assert missed == set()


@pytest.mark.parametrize("name", alerts())
def test_every_alert_has_a_runbook_and_says_where(name: str) -> None:
    notes = alerts()[name]["annotations"]
    assert notes["runbook_url"] == f"{{{{ $externalURL }}}}/consoles/storaged/{name}.html"
    assert (RULES / "consoles" / "storaged" / f"{name}.html").is_file()
    assert notes["summary"]
    assert notes["description"]
    text = (BOOKS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)) == PARTS
    sections = dict(zip(PARTS, re.split(r"^## .+$", text, flags=re.MULTILINE)[1:], strict=True))
    assert all(len(section.split()) >= 10 for section in sections.values())
    assert "```" in sections["Diagnosis"], "with commands"


def test_there_is_no_runbook_without_an_alert() -> None:
    assert {path.stem for path in BOOKS.glob("*.md")} - {"README"} == set(alerts())


def test_rules_ask_for_series_that_exist() -> None:
    text = "".join((RULES / name).read_text(encoding="utf-8") for name in ("rules.yml", "alerts.yml"))
    expressions = [
        rule["expr"] for group in yaml.safe_load((RULES / "rules.yml").read_text())["groups"] for rule in group["rules"]
    ]
    expressions += [rule["expr"] for rule in alerts().values()]
    recorded = set(re.findall(r"record: (\S+)", text))
    for expression in expressions:
        names = set(re.findall(r"(?<![\w:])(?:\w+:)?(?:storaged|grpc_server)_[\w:]+", expression))
        assert names <= set(KNOWN) | recorded, expression


def test_the_examples_are_valid() -> None:
    done = promtool("check", "config", str(RULES / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("check", "rules", str(RULES / "rules.yml"), str(RULES / "alerts.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    checked = subprocess.run(
        [tool("amtool"), "check-config", str(ROOT / "packaging" / "alertmanager" / "alertmanager.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
