"""Copying one folder gives a Grafana the dashboards; what the pages promise is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from dashboards.build import BOARDS, TEXTS
from lab.prometheus import ROOT
from tests.dashboards.test_alerts import alerts
from tests.dashboards.test_lint import load

PROVISIONING = ROOT / "packaging" / "grafana" / "provisioning"


def test_one_copied_folder_holds_everything(tmp_path: Path) -> None:
    copied = tmp_path / "etc" / "grafana" / "provisioning"
    shutil.copytree(PROVISIONING, copied, symlinks=False)
    (provider,) = yaml.safe_load((copied / "dashboards" / "storaged.yaml").read_text(encoding="utf-8"))["providers"]
    folder = tmp_path / Path(provider["options"]["path"]).relative_to("/")
    assert {path.name for path in folder.iterdir()} == {f"{name}.json" for name in (*BOARDS, TEXTS)}
    assert (folder / "guest.json").read_bytes() == (ROOT / "dashboards" / "storaged" / "guest.json").read_bytes()
    (source,) = yaml.safe_load((copied / "datasources" / "storaged.yaml").read_text(encoding="utf-8"))["datasources"]
    scraped = yaml.safe_load((ROOT / "packaging" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]


def test_the_jobs_are_those_that_alerts_and_dashboards_name() -> None:
    scraped = yaml.safe_load((ROOT / "packaging" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    jobs = {one["job_name"] for one in scraped["scrape_configs"]}
    pattern = re.search(r'job=~"([^"]+)"', alerts()["StoragedDown"]["expr"])
    assert pattern is not None
    assert all(re.fullmatch(pattern[1], job) for job in jobs)


def test_the_page_lists_every_alert_and_dashboard() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| \[(\w+)\]\(\S+\) \| .+ \| (\w+) \|$", page, re.MULTILINE))
    assert listed == {name: rule["labels"]["severity"] for name, rule in alerts().items()}
    for name in (*BOARDS, TEXTS):
        assert f"**{load(name)['title'].removeprefix('storaged / ')}**" in page
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
