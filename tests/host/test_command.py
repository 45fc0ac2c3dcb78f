"""`storaged-host serve` as a process, beside a real storaged and an agent that knows Maitred alone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.agent import agent, serve
from lab.daemon import Daemon
from storaged.host.config import parse
from storaged.units import GIB

COMMAND = [sys.executable, "-m", "storaged.host", "serve", "--config"]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A directory with two images, on whatever filesystem the tests run."""
    for name in ("storaged", "other"):
        with (tmp_path / f"{name}.img").open("wb") as file:
            file.truncate(20 * GIB)
    (tmp_path / "host.toml").write_text(f"""
[resize]
state_dir = "{tmp_path}/state"
[pool.p]
path = "{tmp_path}"
[sharing]
reserve_least = "16MiB"
base = "64MiB"
[guest.storaged]
address = "unix:{tmp_path}/storaged.sock"
image = "{tmp_path}/storaged.img"
[guest.other]
address = "unix:{tmp_path}/other.sock"
image = "{tmp_path}/other.img"
weight = 2
""")
    return tmp_path


@pytest.fixture
def host(pool: Path) -> Iterator[subprocess.Popen[str]]:
    with (pool / "host.log").open("w") as log:
        process = subprocess.Popen([*COMMAND, str(pool / "host.toml")], stderr=log, text=True)
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()


@pytest.fixture
def daemon(pool: Path) -> Iterator[Daemon]:
    with Daemon(pool) as daemon:
        yield daemon


async def test_a_storaged_and_another_agent_share_a_pool(
    pool: Path, daemon: Daemon, host: subprocess.Popen[str]
) -> None:
    other = agent()
    server = await serve(other, pool / "other.sock")
    try:
        ends = time.monotonic() + 20
        while True:
            report = await asyncio.to_thread(daemon.report)
            if report.pressure.HasField("host_free_bytes") and other.allowed is not None:
                break
            assert time.monotonic() < ends, (pool / "host.log").read_text()
            await asyncio.sleep(0.1)
        stats = os.statvfs(pool)
        told = report.pressure.host_free_bytes - GIB
        assert told > 0
        assert told + other.allowed <= stats.f_bavail * stats.f_frsize
        host.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(host.wait, 10) == 0
        log = (pool / "host.log").read_text()
        assert "other is no storaged" in log
        assert "Traceback" not in log
    finally:
        await server.stop(None)


GUEST = "[pool.p]\npath = '/tmp'\n[guest.g]\n"
DISCOVERY = "[pool.p]\npath = '/tmp'\n[discovery]\naddress = 'tcp:{host}:8888'\nimage = '/tmp/{host}.img'"


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("[pool.p]\npath = 'x'", 2, "pool.p.path"),
        ("[pool.p]\npath = '/none/such'", 1, "No such file"),
        ("[serve]\nlisten = ['tcp:0.0.0.0:0']\n[pool.p]\npath = '/tmp'", 2, "needs [tls]"),
        (
            GUEST + "address = 'tcp:10.0.0.5:8888'\nimage = '/tmp/x'",
            2,
            "guest.g.address = 'tcp:10.0.0.5:8888' needs [tls]",
        ),
        ("[pool.p]\npath = '/tmp'\n[resize]\nstate_dir = '/dev/null/x'", 2, "cannot be used"),
        ("[serve]\nlisten = ['unix:/none/such/s']\n[pool.p]\npath = '/tmp'", 2, "there is no directory for it"),
        ("[pool.p]\npath = '/tmp'\n[pool.q]\npath = '/tmp'", 2, "is on the filesystem of pool.p.path"),
        ("[pool.p]\npath = '/dev/null'", 2, "is no directory"),
        ("x = " + 3000 * "[" + 3000 * "]", 2, "too deep in each other"),
        (GUEST + "address = 'unix:/s'\nimage = '/tmp/x'\npeer = 'nonsense'", 2, "guest.g.peer = 'nonsense'"),
        (GUEST + f"address = 'unix:/s'\nimage = '/tmp/x'\ncontrol = 'qmp:/{'x' * 300}'", 2, "has at most"),
        (
            "serve.listen = ['unix:/tmp/s']\n" + GUEST + "address = 'unix:/tmp/s'\nimage = '/tmp/x'",
            2,
            "is where storaged-host itself listens",
        ),
        (DISCOVERY, 2, "discovery.address = 'tcp:{host}:8888' needs [tls]"),
    ],
)
def test_what_cannot_be_is_said_at_once(tmp_path: Path, text: str, code: int, says: str) -> None:
    state = "" if "state_dir" in text else f"[resize]\nstate_dir = '{tmp_path}/state'\n"
    (tmp_path / "host.toml").write_text(f"{text}\n{state}")
    done = subprocess.run(
        [*COMMAND, str(tmp_path / "host.toml")], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == code
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("address", ["tcp:127.0.0.1:8888", "tcp:[::1]:8888", "unix:/run/g.sock", "vsock:3:8888"])
def test_on_this_machine_a_guest_needs_no_certificate(address: str) -> None:
    guest = {"address": address, "image": "/vms/g.img"}
    assert parse({"pool": {"p": {"path": "/vms"}}, "guest": {"g": guest}}).guests[0].name == "g"


def test_with_certificates_a_guest_may_be_anywhere() -> None:
    document = {
        "pool": {"p": {"path": "/vms"}},
        "guest": {"g": {"address": "tcp:10.0.0.5:8888", "image": "/vms/g.img"}},
        "discovery": {"address": "tcp:{host}:8888", "image": "/vms/{host}.img"},
        "tls": {"authority": "/ca.pem", "certificate": "/host.pem", "key": "/host.key"},
    }
    discovery = parse(document).discovery
    assert discovery is not None
    assert discovery.guest("ipv4:10.0.0.6") is not None


def test_a_simulated_host_takes_no_socket_from_another(tmp_path: Path) -> None:
    path = tmp_path / "host.sock"
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        owner.listen()
        command = [
            *COMMAND[:-1],
            "--sim",
            "2",
            "--control",
            f"unix:{path}",
            "--console",
            f"unix:{tmp_path}/console.sock",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 1
        assert "served by another process" in done.stderr
        owner.setblocking(False)
        owner.accept()[0].close()  # it only looked
