"""storagectl as a process of its own, with or without a terminal."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from lab.daemon import Daemon
from tests.ctl.fake import FakeDaemon

CTL = (sys.executable, "-m", "storaged.ctl.main")
WITHIN_S = 30.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(**more: str) -> dict[str, str]:
    """Ours, without what would change how storagectl behaves."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("STORAGED_GUEST", "COLUMNS", "LINES", "NO_COLOR")
    }
    return kept | {"TERM": "xterm", "LC_ALL": "C.UTF-8"} | more


def ctl(address: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run storagectl without a terminal."""
    return subprocess.run(
        (*CTL, "--guest", address, *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        env=environment(**more),
        check=False,
    )


class OnTerminal:
    """storagectl on a pseudo-terminal of its own, which is its controlling one: a typed Ctrl-C is a real SIGINT."""

    def __init__(self, address: str, *arguments: str, columns: int = 80, rows: int = 24) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._process = subprocess.Popen(
            # Whoever started the tests in the background had them ignore SIGINT, and that is inherited.
            ("env", "--default-signal=INT", "setsid", "--ctty", "--wait", *CTL, "--guest", address, *arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(),
        )
        os.close(slave)
        self.raw = ""

    @property
    def text(self) -> str:
        """What came so far, without colours and cursor movements."""
        return _ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    @property
    def lines(self) -> list[str]:
        """The same, with every redrawing of a line as a line."""
        return re.split(r"[\r\n]+", self.text)

    def wait_for(self, text: str, within_s: float = WITHIN_S) -> None:
        """Read until `text` has come."""
        until = time.monotonic() + within_s
        while text not in self.text:
            assert time.monotonic() < until, f"no {text!r} in:\n{self.text}"
            if not self._read(0.1):
                assert text in self.text, f"ended without {text!r}:\n{self.text}"

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def wait(self, within_s: float = WITHIN_S) -> int:
        """Read to the end; the exit code."""
        until = time.monotonic() + within_s
        while self._read(0.1):
            assert time.monotonic() < until, f"does not end:\n{self.text}"
        return self._process.wait(5)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._master], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # what Linux says when the other side has closed
                raise
            return False
        self.raw += data.decode()
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._master)  # which hangs up on storagectl if it still runs
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A real daemon on a simulated filesystem of 8 GiB, whose device a job may wait long for."""
    directory = tmp_path_factory.mktemp("daemon")
    settings = directory / "storaged.toml"
    settings.write_text("[storage]\ncapacity_wait_s = 600\nsettle_s = 0\n")
    with Daemon(directory, "--config", str(settings)) as running:
        yield running


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon that says what the test tells it to."""
    with FakeDaemon(tmp_path) as running:
        yield running
