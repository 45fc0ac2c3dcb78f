"""The units: what they claim about their sandbox is what systemd says, and they are free of mistakes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storaged.config import load

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "packaging" / "systemd"
PAGE = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def security(unit: str) -> str:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    version = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=False).stdout
    if not version.startswith("systemd 252"):
        pytest.skip("what is written down is what systemd 252 says")
    if "Overall exposure" not in done.stdout:
        pytest.skip(f"systemd-analyze cannot judge a file here: {done.stderr.strip()[:80]}")
    return done.stdout


@needs_systemd
@pytest.mark.parametrize("unit", ["storaged.service", "storaged-guest.service"])
def test_the_exposure_is_the_one_that_is_written_down(unit: str) -> None:
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d)", security(unit))
    told = re.search(rf"^\| `{re.escape(unit)}` \| .* \| (\d+\.\d) \|$", PAGE, re.MULTILINE)
    assert found is not None
    assert told is not None
    assert told[1] == found[1]


@needs_systemd
def test_every_exception_is_explained_and_nothing_else() -> None:
    marked = {line.split()[1] for line in security("storaged.service").splitlines() if line.startswith("✗")}
    table = PAGE.partition("| marked | because |")[2].partition("\n\n")[0]
    told = {name.replace("\\|", "|") for name in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)}
    assert told == marked


@needs_systemd
@pytest.mark.parametrize("unit", ["storaged.service", "storaged-guest.service"])
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    text = (UNITS / unit).read_text(encoding="utf-8")
    (tmp_path / unit).write_text(text.replace("/usr/bin/storaged", sys.executable), encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert unit not in done.stderr, done.stderr


def test_the_settings_that_are_shipped_are_sound() -> None:
    settings = load(str(UNITS / "storaged.toml"))
    assert "unix:/run/storaged/storaged.sock" in settings.serve.listen
    assert settings.serve.notify_host == "host"
