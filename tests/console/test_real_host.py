"""`storaged-host serve` with a console, beside a real storaged: what people see is what the guest says."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.daemon import Daemon
from lab.simulated import free_port
from storaged.units import GIB

WITHIN_S = 30.0


@pytest.fixture
def port(tmp_path: Path) -> int:
    port = free_port()
    with (tmp_path / "web.img").open("wb") as file:
        file.truncate(20 * GIB)
    (tmp_path / "host.toml").write_text(f"""
[serve]
listen = ["unix:{tmp_path}/host.sock"]
[console]
listen = "tcp:127.0.0.1:{port}"
[resize]
state_dir = "{tmp_path}/state"
[pool.p]
path = "{tmp_path}"
[sharing]
reserve_least = "16MiB"
base = "64MiB"
[guest.web]
address = "unix:{tmp_path}/storaged.sock"
image = "{tmp_path}/web.img"
""")
    return port


@pytest.fixture
def host(tmp_path: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "storaged.host", "serve", "--config", str(tmp_path / "host.toml")]
    with (tmp_path / "host.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()


def signed_in(directory: Path) -> str:
    """The cookie of a browser that followed the link which the command line printed."""
    command = [sys.executable, "-m", "storaged.ctl.main", "--host", f"unix:{directory}/host.sock", "console"]
    link = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    address, _, path = link.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", f"/{path}")
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return (answer.headers["set-cookie"] or "").partition(";")[0]


def ask(
    port: int, method: str, path: str, body: object = None, token: str = "", cookie: str = ""
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"content-type": "application/json", "x-storaged-token": token, "cookie": cookie}
    connection.request(method, path, json.dumps(body), headers)
    answer = connection.getresponse()
    value = json.loads(answer.read())
    connection.close()
    return answer.status, value


def state(port: int, log: Path, until: str, cookie: str) -> dict[str, Any]:
    """The console's state once the guest has `until`."""
    ends = time.monotonic() + WITHIN_S
    while True:
        try:
            found = ask(port, "GET", "/api/state", cookie=cookie)[1]
        except OSError:
            found = {"guests": []}
        if found["guests"] and found["guests"][0][until]:
            return found
        assert time.monotonic() < ends, f"{found}\n{log.read_text()}"
        time.sleep(0.1)


def test_the_console_says_what_the_guest_says(tmp_path: Path, port: int, host: subprocess.Popen[bytes]) -> None:
    log = tmp_path / "host.log"
    ends = time.monotonic() + WITHIN_S
    while not (tmp_path / "host.sock").exists():
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.05)
    cookie = signed_in(tmp_path)
    assert "login?code=" not in log.read_text(), "others may read the log"
    assert ask(port, "GET", "/api/state")[0] == 401
    with Daemon(tmp_path) as daemon:
        ends = time.monotonic() + WITHIN_S
        while True:  # its first grants move the balloon, and with it the bounds
            found = state(port, log, "minimum", cookie)
            web, report = found["guests"][0], daemon.report()
            if web["minimum"] == report.bounds.minimum_size or time.monotonic() > ends:
                break
            time.sleep(0.2)
        assert (web["name"], web["state"], web["pool"]) == ("web", "up", "p")
        assert web["size"] == report.filesystem.size_bytes
        assert web["minimum"] == report.bounds.minimum_size
        assert web["logical"] == 20 * GIB
        assert found["pools"][0]["free"] > 0
        assert found["history"]["p"]
        token = ask(port, "GET", "/api/session", cookie=cookie)[1]["token"]
        status, said = ask(port, "POST", "/api/guests/none/resize", {"size": GIB}, token, cookie)
        assert (status, said["error"]) == (409, "no guest is called 'none'")
    stale = state(port, log, "stale", cookie)["guests"][0]
    assert stale["size"] == web["size"]  # old, and said to be
    host.send_signal(signal.SIGTERM)
    assert host.wait(15) == 0
    assert "Traceback" not in log.read_text()


def test_a_console_needs_somebody_to_ask(tmp_path: Path, port: int) -> None:
    config = tmp_path / "host.toml"
    config.write_text(config.read_text().replace(f"unix:{tmp_path}/host.sock", "tcp:127.0.0.1:0"))
    command = [sys.executable, "-m", "storaged.host", "serve", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "console.listen needs a unix: address in serve.listen" in done.stderr
