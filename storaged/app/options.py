"""What one run of the daemon is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storaged.config import Settings
from storaged.units import GIB


@dataclass(frozen=True, slots=True)
class Options:
    """What one run of `storaged serve` was asked for. `reread` gets the settings anew, where there is a file."""

    settings: Settings
    reread: Callable[[], Settings] | None = None
    sim: bool = False
    sim_size: int = 8 * GIB
    sim_speed: int = 0
