"""Mount9P for real: a vsock connection, the kernel's own 9p client, and a 9p server of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest import uml

SCRIPT = """
import asyncio, os, socket, subprocess, threading
from storaged.errors import StoragedError
from storaged.guest import kernel_mounts
from storaged.guest.mounts import Mount9P, Mounts

kernel_mounts.HOST_CID = 1  # vsock's loopback stands for the host
os.mkdir("/run/export")
with open("/run/export/hello", "w") as file:
    file.write("world")
listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
listener.bind((0xFFFFFFFF, 9999))
listener.listen()
ended = threading.Event()

def serve():
    for kind in ("server", "closes at once"):
        connection, _ = listener.accept()
        if kind == "server":
            number = str(connection.fileno())
            server = subprocess.Popen(
                ["{diod}", "-f", "-n", "-e", "/run/export", "-S", "-U", "root", "-r", number, "-w", number],
                pass_fds=[connection.fileno()],
            )
            connection.close()
            server.wait()
            ended.set()
        connection.close()

threading.Thread(target=serve, daemon=True).start()

class Kernel(kernel_mounts.KernelMounts):
    def mount(self, source, target, fstype, flags, options):
        # This server wants to hear what to serve; a host's serves one thing.
        super().mount(source, target, fstype, flags, options + ",aname=/run/export")

def vsocks():
    return [n for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{{n}}")
            and os.readlink(f"/proc/self/fd/{{n}}").startswith("socket:") and int(n) != listener.fileno()]

async def refused(mounts, port, what):
    try:
        await mounts.mount_9p(Mount9P(port, "/run/other/deep"))
    except StoragedError as error:
        print(what, "refused:", error.message)
    else:
        raise AssertionError(what)
    assert not os.path.exists("/run/other"), what

async def main():
    kernel = Kernel()
    mounts = Mounts(kernel)
    before = len(vsocks())
    target = "/run/deep/shared"
    await mounts.mount_9p(Mount9P(9999, target))
    assert open(f"{{target}}/hello").read() == "world"
    with open(f"{{target}}/new", "wb") as file:
        file.write(bytes(300_000))
    assert os.path.getsize("/run/export/new") == 300_000
    (line,) = [line for line in open("/proc/mounts") if target in line]
    for word in ("9p", "nosuid", "nodev", "access=any", "msize=65536", "trans=fd"):
        assert word in line, line
    kernel.unmount(target)
    assert ended.wait(10), "the connection ends with the mount: nobody else holds it"
    await refused(mounts, 9998, "nobody listens")
    await refused(mounts, 9999, "not 9p")
    assert len(vsocks()) == before, vsocks()

asyncio.run(main())
"""


@pytest.mark.skipif(bool(uml.why_not()), reason=f"9p: {uml.why_not()}")
def test_a_directory_of_a_host(tmp_path: Path) -> None:
    text = uml.run(tmp_path, SCRIPT.format(diod=uml.found("diod")))
    assert "nobody listens refused: vsock port 9998" in text
    assert "not 9p refused: 9p at /run/other/deep" in text
