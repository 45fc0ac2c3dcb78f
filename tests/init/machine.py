"""A container that is this machine's system with a memory of its own on top: systemd boots in it, nothing is kept.

It shares the kernel: a test must never report LOW or CRITICAL in it, which would change vm.dirty_bytes for everybody.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_UNPACKED = ROOT / "build" / "nspawn" / "usr" / "bin" / "systemd-nspawn"
NSPAWN = shutil.which("systemd-nspawn") or (str(_UNPACKED) if _UNPACKED.exists() else "")
"""Debian's systemd-container, installed or unpacked by tools/beside.sh."""
SETTINGS = '[serve]\nlisten = ["unix:/run/storaged/storaged.sock"]\n'
TARGET = """\
[Unit]
Requires=sysinit.target basic.target
After=basic.target
Wants=storaged.service dbus.socket systemd-logind.service
AllowIsolate=yes
"""
MOUNT = "[Unit]\n[Mount]\nWhat=/dev/vdb\nWhere=/mnt/stateful\nType=btrfs\nOptions=discard\n"
PROGRAM = '#!/bin/sh\nexport PYTHONPATH=/opt/storaged\nexec {python} -m storaged "$@"\n'


def why_not() -> str:
    """Why no such machine can be made here; empty when it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not NSPAWN:
        return "needs systemd-nspawn (tools/beside.sh unpacks it)"
    missing = [
        tool for tool in ("mkfs.btrfs", "losetup", "nsenter", "systemctl", "dbus-daemon") if not shutil.which(tool)
    ]
    if missing:
        return f"needs {', '.join(missing)}"
    if not _python():
        return f"needs a Python {sys.version_info.major}.{sys.version_info.minor} outside of a home directory"
    return ""


def _python() -> str:
    """An interpreter that a unit with ProtectHome=yes can see, and that loads our compiled modules."""
    name = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return name if os.access(name, os.X_OK) else ""


class Machine:
    """Boot it with `start`; `close` takes everything away again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "t" / "root"
        self._loop = ""
        self._mounted: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        memory = self.directory / "t"
        memory.mkdir()
        self._mount(memory, "-t", "tmpfs", "-o", "size=1g", "storaged-init")
        for name in ("upper", "work", "root"):
            (memory / name).mkdir()
        layers = f"lowerdir=/,upperdir={memory}/upper,workdir={memory}/work"
        self._mount(self.root, "-t", "overlay", "-o", layers, "storaged-init")
        self._install()
        image = self.directory / "image"
        with image.open("wb") as file:
            file.truncate(4 << 30)
        _run("mkfs.btrfs", "-q", "-f", str(image))
        self._loop = _run("losetup", "--show", "-f", "--direct-io=off", str(image)).strip()
        command = [NSPAWN, "-D", str(self.root), "--register=no", "--keep-unit", "--console=pipe"]
        command += [f"--machine=storaged-{os.getpid()}", f"--bind={self._loop}:/dev/vdb", "-b", "systemd.unit=t.target"]
        log = (self.directory / "console").open("wb")
        with log:
            # Its private libraries stand beside systemd-nspawn when it is only unpacked.
            environment = {**os.environ, "LD_LIBRARY_PATH": "/usr/lib/x86_64-linux-gnu/systemd"}
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.until(lambda: self.state("storaged")[0] == "active", 60)

    def _mount(self, where: Path, *arguments: str) -> None:
        _run("mount", *arguments, str(where))
        self._mounted.append(where)

    def _install(self) -> None:
        packages = self.root / "opt" / "storaged"
        shutil.copytree(sysconfig.get_path("purelib"), packages, ignore=shutil.ignore_patterns("__editable__*", "pip"))
        shutil.copytree(ROOT / "storaged", packages / "storaged", dirs_exist_ok=True)
        program = self.root / "usr/bin/storaged"
        program.write_text(PROGRAM.format(python=_python()))
        program.chmod(0o755)
        units = self.root / "etc/systemd/system"
        shutil.rmtree(units)
        shutil.copytree(ROOT / "packaging/systemd", units)
        (units / "mnt-stateful.mount").write_text(MOUNT)
        (units / "t.target").write_text(TARGET)
        (self.root / "etc/fstab").write_text("")
        (self.root / "etc/storaged").mkdir()
        self.settings.write_text(SETTINGS)
        (self.root / "mnt/stateful").mkdir(parents=True, exist_ok=True)

    @property
    def settings(self) -> Path:
        """The daemon's settings."""
        return self.root / "etc/storaged/storaged.toml"

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside; what it said."""
        leader = self._leader()
        assert leader, "the machine is off"
        inside = ["nsenter", "-t", leader, "-m", "-p", "-u", "-i", "-n", "-C", *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def call(self, *lines: str) -> str:
        """Run Python inside, with `maitred`, a stub of the daemon, `vm` and `EMPTY` at hand."""
        head = [
            "import sys; sys.path.insert(0, '/opt/storaged')",
            "import grpc",
            "from storaged.rpc.proto import common_pb2, vm_guest_pb2 as vm, vm_guest_pb2_grpc",
            "maitred = vm_guest_pb2_grpc.MaitredStub(grpc.insecure_channel('unix:/run/storaged/storaged.sock'))",
            "EMPTY = common_pb2.EmptyMessage()",
        ]
        return self.run(_python(), "-c", "\n".join([*head, *lines]))

    def state(self, unit: str) -> tuple[str, str, int]:
        """ActiveState, StatusText and NRestarts of a unit; empty while the machine is not there."""
        if not self._leader():
            return "", "", 0
        text = self.run("systemctl", "show", unit, "-p", "ActiveState,StatusText,NRestarts", check=False)
        found = dict(line.partition("=")[::2] for line in text.splitlines())
        return found.get("ActiveState", ""), found.get("StatusText", ""), int(found.get("NRestarts", 0))

    def journal(self, unit: str = "storaged", *arguments: str) -> str:
        """What the unit's journal says."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, *arguments)

    def _leader(self) -> str:
        assert self._process is not None
        try:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text(encoding="ascii")
        except OSError:
            return ""
        return children.split()[0] if children.split() else ""

    @property
    def off(self) -> bool:
        """True when its power is off."""
        assert self._process is not None
        return self._process.poll() is not None

    def until(self, condition: Callable[[], bool], within_s: float = 30) -> None:
        """Wait until `condition` holds."""
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, (self.directory / "console").read_text(errors="replace")[-2000:]
            time.sleep(0.1)

    def close(self) -> None:
        """Off, and nothing is left."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)  # SIGKILL would leave the container behind
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for where in reversed(self._mounted):
            _run("umount", str(where))
        if self._loop:
            _run("losetup", "-d", self._loop)
        for name in ("propagate", "locks", ""):
            with contextlib.suppress(OSError):  # others have machines too
                os.rmdir(f"/run/systemd/nspawn/{name}")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
