"""A machine that is booted once and saved, so that others begin where it was."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lab.vm import image
from lab.vm.guests import SERVES, settings_script, several_script
from lab.vm.machine import Machine, free_directory, until


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a machine can begin."""

    booted: Path
    """It waits for its process 1."""
    serving: Path
    """The daemon is process 1, and waits for its filesystem."""


async def save(directory: Path) -> Saved:
    """Boot one, and save it in `directory` before and after its daemon starts."""
    image.disk()
    image.initramfs()
    booted_at, serving_at = directory / "booted", directory / "serving"
    machine = Machine(free_directory(directory, "first"), 3)
    began = time.monotonic()
    try:
        await machine.power_on()
        await machine.booted()
        booted = time.monotonic()
        await machine.save(booted_at)
        await machine.go()
        await machine.run(settings_script())
        await until(lambda: SERVES in machine.console_path.read_bytes(), 60, "the daemon serves")
        await machine.save(serving_at)
    except BaseException:
        print(machine.says())
        raise
    finally:
        await machine.close()
    print(f"vm: booted in {booted - began:.1f} s, saved in {time.monotonic() - booted:.1f} s")
    return Saved(booted_at, serving_at)


async def save_several(saved: Saved, count: int) -> Path:
    """The serving one with `count` daemons, saved beside it."""
    state = saved.serving.parent / "several"
    machine = Machine(free_directory(saved.serving.parent, "second"), 3)
    try:
        await machine.wake(saved.serving)
        await machine.go()
        await machine.run(several_script(count))
        await until(lambda: machine.console_path.read_bytes().count(SERVES) == count - 1, 90, "the daemons serve")
        await machine.save(state)
    except BaseException:
        print(machine.says())
        raise
    finally:
        await machine.close()
    return state
