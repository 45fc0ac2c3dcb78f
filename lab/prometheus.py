"""A real Prometheus with our rules, on a port of its own, and the questions that Grafana asks it.

Found on PATH, or in build/prometheus where `make setup` unpacks Debian's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "packaging" / "prometheus"
STARTS_WITHIN_S = 30.0
SCRAPE_S = 1


def find(name: str) -> str | None:
    """One of Prometheus' programs; None when it is not on this machine."""
    beside = ROOT / "build" / "prometheus" / "usr" / "bin" / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


@dataclass(frozen=True, slots=True)
class Target:
    """What is scraped. The labels are what a user's scrape configuration gives."""

    job: str
    address: str
    path: str
    labels: tuple[tuple[str, str], ...]


class BadQuery(Exception):
    """Prometheus refused a query."""


class Prometheus:
    """Scrapes `targets` every second with our rules and alerts, until the end of `with`."""

    def __init__(self, directory: Path, targets: list[Target], port: int) -> None:
        self._directory = directory
        self._targets = targets
        self.url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        return self.start()

    def start(self) -> Self:
        """Start it and wait until it answers. Raises RuntimeError with its log when it does not."""
        program = find("prometheus")
        if program is None:
            raise RuntimeError("prometheus is not on this machine")
        self._directory.mkdir(exist_ok=True)
        for name in ("rules.yml", "alerts.yml"):
            text = (CONFIGURATION / name).read_text(encoding="utf-8")
            (self._directory / name).write_text(text.replace("interval: 30s", "interval: 1s"), encoding="utf-8")
        (self._directory / "prometheus.yml").write_text(self._config(), encoding="utf-8")
        with (self._directory / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={self._directory}/prometheus.yml",
                    f"--storage.tsdb.path={self._directory}/data",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                    f"--web.external-url={self.url}",
                    f"--web.console.templates={CONFIGURATION}/consoles",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        assert self._process is not None
        until = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2):
                    return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError((self._directory / "prometheus.log").read_text(encoding="utf-8")) from None
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM and wait."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _config(self) -> str:
        """As the shipped scrape configuration, with these targets, faster. JSON, which YAML's readers read too."""
        jobs = [
            {
                "job_name": job,
                "static_configs": [
                    {"targets": [one.address], "labels": {"__metrics_path__": one.path, **dict(one.labels)}}
                    for one in self._targets
                    if one.job == job
                ],
            }
            for job in sorted({one.job for one in self._targets})
        ]
        pace = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
        return json.dumps({"global": pace, "rule_files": ["rules.yml", "alerts.yml"], "scrape_configs": jobs})

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise BadQuery(json.load(error)["error"]) from None

    def at(self, expression: str, when: float) -> list[Any]:
        """An instant query; as a list of series with `values`."""
        data = self._get("query", query=expression, time=f"{when:.3f}")
        assert data["resultType"] in {"vector", "scalar"}
        return [{"metric": one["metric"], "values": [one["value"]]} for one in data["result"]]

    def over(self, expression: str, start: float, end: float, step: float) -> list[Any]:
        """A range query; a list of series with `values`."""
        result: list[Any] = self._get(
            "query_range", query=expression, start=f"{start:.3f}", end=f"{end:.3f}", step=f"{step:g}"
        )["result"]
        return result

    def label_values(self, selector: str, label: str) -> list[str]:
        """What `label_values(selector, label)` gives in Grafana."""
        values: list[str] = self._get(f"label/{label}/values", **{"match[]": selector})
        return values

    def alerts(self) -> list[Any]:
        """Those that are pending or firing."""
        found: list[Any] = self._get("alerts")["alerts"]
        return found

    def unhealthy(self) -> list[str]:
        """Scrapes and rules that fail, and why."""
        targets = self._get("targets")["activeTargets"]
        scrapes = [f"{one['scrapeUrl']}: {one['lastError']}" for one in targets if one["health"] != "up"]
        rules = [
            f"{rule['name']}: {rule.get('lastError')}"
            for group in self._get("rules")["groups"]
            for rule in group["rules"]
            if rule["health"] != "ok"
        ]
        return scrapes + rules
