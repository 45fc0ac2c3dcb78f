"""Attacks on the balloon's promise: real daemons, real btrfs, and applications that write every block they can."""

from __future__ import annotations

from functools import partial

from lab.attack.registry import Scenario


def scenarios(storm_s: float = 120.0) -> dict[str, Scenario]:
    """Every scenario by its name, in the order in which they run; the storm lasts `storm_s` seconds."""
    # Each of these registers its scenarios.
    from lab.attack import (  # noqa: F401
        commands,
        hands,
        idle,
        large,
        preallocated,
        punched,
        restores,
        rounds,
        small_files,
    )
    from lab.attack.registry import SCENARIOS
    from lab.attack.storm.run import storm

    ordered = dict(sorted(SCENARIOS.items()))
    return {**ordered, "storm": Scenario("storm", partial(storm, seconds=storm_s), ("shm", "disk"), quick=False)}
