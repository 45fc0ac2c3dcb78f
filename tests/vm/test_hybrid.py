"""`storaged-host` on a guest's vsock device without anybody between: it hears VmReady, and calls back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lab.vm.controller import Controller
from lab.vm.disks import blank
from lab.vm.machine import until
from storaged.units import GIB
from tests.vm.conftest import MakeGuest

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
]


async def test_vm_ready_arrives_at_the_controller_and_it_calls_back(make_guest: MakeGuest, place: Path) -> None:
    guest = make_guest()
    guest.host.hears = False
    disk = blank(place / "stateful", 4 * GIB)
    controller = Controller(guest.machine.directory, {"vm": (guest, disk)}, hybrid=True)
    try:
        controller.begin_serving()
        await until(lambda: guest.machine.uds.with_name("vsock_7777").exists(), 30, "the controller listens")
        await guest.begin(disk)
        await guest.start_daemon()
        await until(lambda: b"knows that we serve" in guest.machine.console_path.read_bytes(), 60, "VmReady")
        await guest.host.call()
        guest.maitred, guest.storage = guest.host.maitred, guest.host.storage
        await guest.start_termina()
        await controller.knows()
        code, out, err = await controller.ctl("resize", "vm", "5G")
        assert code == 0, err
        assert (await guest.status()).current_size == 5 * GIB == (await asyncio.to_thread(disk.stat)).st_size
        print(out)
    finally:
        controller.close()
        print(controller.log.read_text())
