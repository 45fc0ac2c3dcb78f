"""True vsock: a virtio device, the kernel's own sockets, and who is let in."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lab.vm.host import EMPTY, connect_to
from lab.vm.parts import kernel_release
from storaged.rpc.proto import vm_guest_pb2
from tests.vm.conftest import MakeGuest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

FROM_INSIDE = """
import socket, sys
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.settimeout(10)
s.connect((int(sys.argv[1]), 8888))
try:
    s.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    got = s.recv(100)
except ConnectionError:
    got = b""
print(len(got))
"""
OWN_CID = """
import fcntl, struct
with open("/dev/vsock", "rb") as device:
    print(struct.unpack("I", fcntl.ioctl(device, 0x7B9, bytes(4)))[0])
"""


async def test_the_guest_announces_itself_and_serves_its_host_alone(make_guest: MakeGuest) -> None:
    guest = make_guest()
    await guest.begin()
    began = time.monotonic()
    await guest.serve()
    print(f"ready {time.monotonic() - began:.1f} s after exec")
    assert guest.host.startup.times == 1
    # The host knows a guest by its device; that the guest has the same number for itself is asked of its kernel.
    assert await guest.machine.run(f"python3 -c '{OWN_CID}'") == str(guest.cid)
    assert await guest.machine.run("cat /proc/1/cmdline | tr '\\0' ' '") == (
        "/usr/bin/python3 -m storaged serve --config /etc/storaged.toml"
    )
    version = await guest.host.maitred.GetKernelVersion(EMPTY, timeout=20)
    assert version.kernel_release == kernel_release()
    assert version.kernel_version.startswith("#1 SMP")

    # The preface of HTTP/2 gets the host an answer, and nobody else: not by loopback, not by the guest's own number.
    await guest.machine.run(f"cat >/tmp/inside.py <<'END'\n{FROM_INSIDE}\nEND")
    for cid in (1, guest.cid):
        assert await guest.machine.run(f"python3 /tmp/inside.py {cid}") == "0", cid
    way = await connect_to(guest.machine.uds, 8888)()
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(way, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    async with asyncio.timeout(10):
        assert await loop.sock_recv(way, 100)
    way.close()


async def test_a_thousand_calls_pass(make_guest: MakeGuest) -> None:
    guest = make_guest()
    await guest.begin()
    await guest.serve()
    began = time.monotonic()
    for _ in range(200):
        assert (await guest.host.maitred.GetKernelVersion(EMPTY, timeout=20)).kernel_release == kernel_release()
    one = time.monotonic() - began
    # Half of what a connection may have at once; a caller that keeps it full may be refused for a moment.
    room = asyncio.Semaphore(200)

    async def call() -> str:
        async with room:
            return str((await guest.host.maitred.GetKernelVersion(EMPTY, timeout=60)).kernel_release)

    answers = await asyncio.gather(*(call() for _ in range(800)))
    print(f"200 calls one after the other {one:.2f} s, 800 by 200 at once {time.monotonic() - began - one:.2f} s")
    assert set(answers) == {kernel_release()}


async def test_one_call_that_is_answered_with_three_megabytes(make_guest: MakeGuest) -> None:
    # No answer of the contract is that large; reflection answers each request in a stream with a whole description.
    guest = make_guest()
    await guest.begin()
    await guest.serve()
    name = vm_guest_pb2.DESCRIPTOR.services_by_name["Maitred"].full_name
    expected = vm_guest_pb2.DESCRIPTOR.serialized_pb
    times = 3_000_000 // len(expected) + 1
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
    began = time.monotonic()
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("grpc.Channel", guest.host.channel))
    call = stub.ServerReflectionInfo(timeout=100)

    async def ask() -> None:
        for _ in range(times):
            await call.write(request)
        await call.done_writing()

    asking = asyncio.create_task(ask())
    got = [answer.file_descriptor_response.file_descriptor_proto[0] async for answer in call]
    await asking
    took = time.monotonic() - began
    print(f"{sum(map(len, got))} bytes in {len(got)} answers of one call, in {took:.1f} s")
    assert len(got) == times
    assert set(got) == {expected}


@pytest.mark.vm_more
async def test_programs_run_and_one_that_fails_is_reported(make_guest: MakeGuest) -> None:
    guest = make_guest()
    await guest.begin()
    await guest.serve()
    request = vm_guest_pb2.LaunchProcessRequest
    launch = guest.host.maitred.LaunchProcess
    script = 'env >/tmp/env; test "$GREETING" = hello; exit 7'
    done = await launch(
        request(argv=["/bin/sh", "-c", script], env={"GREETING": "hello"}, wait_for_exit=True), timeout=20
    )
    assert (done.status, done.code) == (vm_guest_pb2.EXITED, 7)
    assert "PATH=/usr/bin:/usr/sbin:/bin:/sbin" in (await guest.machine.run("cat /tmp/env")).split("\n")
    failed = await launch(request(argv=["/no/such/program"]), timeout=20)
    assert failed.status == vm_guest_pb2.FAILED
    await launch(request(argv=["/bin/false"], respawn=True), timeout=20)
    async with asyncio.timeout(30):
        while len(guest.host.crashes.programs) < 3:
            await asyncio.sleep(0.1)
    assert {name.rpartition("/")[2] for name in guest.host.crashes.programs} == {"false"}
    # Process 1 reaps whatever is orphaned.
    await guest.machine.run("(sleep 0.2 &) ; (sh -c 'sleep 0.1 & exit' &)")
    zombies = "for s in /proc/[0-9]*/stat; do read -r l <$s && case $l in *') Z '*) echo $l;; esac; done; true"
    async with asyncio.timeout(20):
        while await guest.machine.run(zombies):
            await asyncio.sleep(0.5)
