"""Attack the balloon's promise and print what was found.

    python -m lab.attack [--seconds N] [--seed N] [--only NAME ...] [--place shm|disk|both] [--list]

Runs every scenario whose name contains one of NAME, then the storm for N seconds; `--only storm` runs it alone.
Exits with 1 when an answer was false. Needs root.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

from lab.attack import scenarios
from lab.attack.registry import Scenario
from lab.attack.testbed import PLACES, opened_testbed
from lab.loop import private_mounts, sweep


def attack(chosen: Scenario, place: str, seed: int, *, quick: bool = False) -> list[str]:
    """One scenario at one place; its faults. A scenario that cannot go on is a fault too."""
    with opened_testbed(chosen.name, place, seed, quick=quick) as bed:
        try:
            return chosen.run(bed)
        except Exception as error:  # noqa: BLE001  # the other scenarios still run
            return [f"{type(error).__name__}: {str(error)[-600:]}"]


def main() -> int:
    """Run what was asked for; 1 when there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="length of the storm at each place")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="may be repeated")
    parser.add_argument("--place", choices=[*PLACES, "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="as in `make test`")
    parser.add_argument("--list", action="store_true", help="names, and what they do")
    arguments = parser.parse_args()
    every = scenarios(arguments.seconds)
    if arguments.list:
        for one in every.values():
            print(f"{one.name:44} {one.about}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is cleaned up
    private_mounts()
    faults = 0
    for place in PLACES if arguments.place == "both" else (arguments.place,):
        sweep(PLACES[place])
        for one in every.values():
            wanted = not arguments.only or any(part in one.name for part in arguments.only)
            if not wanted or place not in one.places or (arguments.quick and not one.quick):
                continue
            print(f"{one.name} [{place}]", flush=True)
            begun = time.monotonic()
            found = attack(one, place, arguments.seed, quick=arguments.quick)
            for fault in found:
                print(f"  FAULT {fault}")
            print(
                f"  {'FAULTS ' + str(len(found)) if found else 'true'} in {time.monotonic() - begun:.1f} s", flush=True
            )
            faults += bool(found)
    print(f"attack: {faults} scenarios found faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
