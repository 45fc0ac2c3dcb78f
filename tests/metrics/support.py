"""A served endpoint and a client for it, promtool, and samples as a dict."""

from __future__ import annotations

import asyncio
import http.client
import socket
import subprocess
from typing import Any, Self

import pytest
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families

from lab.prometheus import find
from storaged.addresses import UnixAddress
from storaged.metrics import exporter
from storaged.metrics.bridge import Source, registry
from storaged.runtime import StorageService

Key = tuple[Any, ...]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def tool(name: str) -> str:
    """One of Prometheus' programs: unpacked by `make setup`, or on PATH. Skips the test when there is none."""
    found = find(name)
    if found is None:
        pytest.skip(f"needs {name} (Debian's prometheus; tools/prometheus.sh)")
    return found


def promtool(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run promtool to its end."""
    return subprocess.run(
        [tool("promtool"), *arguments], input=stdin.decode(), capture_output=True, text=True, check=False
    )


def written(*sources: Source, accept: str = "") -> str:
    """What a scraper reads that accepts this."""
    encoder, _ = choose_encoder(accept)
    return encoder(registry(*sources)).decode()


def samples(text: str) -> dict[Key, float]:
    """Value by (name, *labels); what is read is Prometheus' text format."""
    return {
        (sample.name, *sorted(sample.labels.items())): float(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(self._path)


def get(address: str, accept: str = "") -> tuple[str, str]:
    """(content type, body) of /metrics at `HOST:PORT` or `unix:/path`."""
    parsed = exporter.parse(address)
    connection = (
        _UnixConnection(parsed.path)
        if isinstance(parsed, UnixAddress)
        else http.client.HTTPConnection(parsed.host.strip("[]"), parsed.port, timeout=10)
    )
    try:
        connection.request("GET", "/metrics", headers={"Accept": accept} if accept else {})
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


class Served:
    """A service's metrics on an address."""

    def __init__(self, service: StorageService, address: str) -> None:
        self._exporter = exporter.serve(service, address)
        self.address = address.removesuffix(":0") + f":{self._exporter.port}" if address.endswith(":0") else address

    async def get(self, accept: str = "") -> tuple[str, str]:
        """(content type, body)."""
        return await asyncio.to_thread(get, self.address, accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exporter.shutdown()
