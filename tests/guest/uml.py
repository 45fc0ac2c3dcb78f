"""Runs a script on a kernel of its own: user-mode Linux on this machine's root, read-only, with an empty /run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / "build" / "uml"
MODULES = (
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vsock_loopback",
    "fs/netfs/netfs",
    "fs/fscache/fscache",
    "net/9p/9pnet",
    "net/9p/9pnet_fd",
    "fs/9p/9p",
)
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LD_LIBRARY_PATH={libraries} PYTHONPATH={root} PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run
for module in {modules}; do [ ! -f "$module" ] || insmod "$module"; done
cd /run
timeout 60 {python} {script} && echo "script: fine"
echo o > /proc/sysrq-trigger; sleep 10
"""


def found(name: str) -> str | None:
    """A program of the packages, installed or unpacked by tools/beside.sh."""
    for place in ("usr/bin", "usr/sbin"):
        if (UNPACKED / place / name).exists():
            return str(UNPACKED / place / name)
    return shutil.which(name)


def why_not() -> str:
    """Why it cannot run here; empty when it can."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        if " amx_tile " in file.read():
            # It saves registers in a buffer that is too small for them: "ptrace set fp regs failed".
            return "user-mode Linux does not run on a processor with AMX; the tests in the virtual machine mount 9p too"
    missing = [name for name in ("linux.uml", "diod") if found(name) is None]
    return f"needs {', '.join(missing)} (tools/beside.sh unpacks them)" if missing else ""


def run(directory: Path, script: str) -> str:
    """What the script printed. Raises AssertionError, with the kernel's words, unless it came to its end."""
    base = UNPACKED if (UNPACKED / "usr/lib/uml").exists() else Path("/")
    (kernel,) = (base / "usr/lib/uml/modules").glob("*/kernel")
    path, init = directory / "script.py", directory / "init"
    path.write_text(script)
    init.write_text(
        INIT.format(
            libraries=":".join(str(UNPACKED / place / "x86_64-linux-gnu") for place in ("usr/lib", "lib")),
            root=ROOT,
            modules=" ".join(str(kernel / f"{module}.ko") for module in MODULES),
            python=sys.executable,
            script=path,
        )
    )
    init.chmod(0o755)
    command = [
        str(found("linux.uml")),
        *("rootfstype=hostfs", "rootflags=/", "ro", "mem=256M", f"init={init}", "con=null", "con0=null,fd:1", "quiet"),
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100, check=False
    )
    text = done.stdout.decode(errors="replace")
    assert "script: fine" in text, text
    return text
