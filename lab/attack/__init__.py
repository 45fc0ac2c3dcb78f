"""Attacks on the balloon's promise: real daemons, real btrfs, and applications that write every block they can."""

from __future__ import annotations

from lab.attack.registry import Scenario


def scenarios(storm_s: float = 120.0) -> dict[str, Scenario]:
    """Every scenario by its name, in the order in which they run; the storm lasts `storm_s` seconds."""
    from lab.attack import hands, idle, preallocated, rounds, small_files
    from lab.attack.registry import SCENARIOS

    del storm_s, hands, idle, preallocated, rounds, small_files
    return SCENARIOS
