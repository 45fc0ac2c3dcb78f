"""Everybody writes all they can on a disk that was promised to all of them, while everything around misbehaves.

    python -m lab.adversary [--seconds N] [--seed N] [--without] [--only ATTACKER ...] [--disk SIZE]
        [--shm]

At the end: I/O errors in the guests, how often the host was full, whether every durable file is whole, whether an
obedient guest was called an overrun, and for how long a good guest had less than a fair share. `--without` runs the
same without a controller: the figures show what it is for. Needs root.
"""

from __future__ import annotations

import argparse
import sys

from lab.adversary.run import ATTACKERS, attack
from lab.loop import memory, workspace
from storaged.units import parse_size


def main() -> int:
    """Run it, print the figures; 1 when anybody was harmed though there was a controller."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", action="store_true", help="without a controller")
    parser.add_argument("--only", nargs="*", choices=ATTACKERS, help="these attackers alone (default: all)")
    parser.add_argument("--disk", type=parse_size, help="the host's disk (default: 7GiB with attackers, 3GiB without)")
    parser.add_argument("--shm", action="store_true", help="on a host whose disk is memory")
    arguments = parser.parse_args()
    attackers = ATTACKERS if arguments.only is None else tuple(arguments.only)
    with workspace(memory() if arguments.shm else None) as directory:
        figures = attack(
            directory,
            arguments.seconds,
            arguments.seed,
            controlled=not arguments.without,
            attackers=attackers,
            size=arguments.disk,
        )
    print(f"adversary, {'no controller' if arguments.without else 'with the controller'}: {figures}")
    return 0 if figures.unharmed or arguments.without else 1


if __name__ == "__main__":
    sys.exit(main())
