"""`make demo`: a full host disk, two guests, balloons, resizes and a crash, for real; `--sim` where that cannot be.

Exit code: 0 when every claim held, 1 when not, 2 wrong use, 128 + signal when it was stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import RenderableType

    from demo.story import Story

FAILED, MISUSED = 1, 2
MIB = 1 << 20
QUICK, FULL = 512 * MIB, 1024 * MIB


class Stopped(BaseException):
    """A signal asks for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make demo ARGS=…", description="A full host disk, two guests, balloons, resizes and a crash, for real."
    )
    parser.add_argument("--sim", action="store_true", help="simulated guests; needs no root, no btrfs")
    parser.add_argument("--quick", action="store_true", help="everything at half the size")
    parser.add_argument("--keep", action="store_true", help="leave all of it running in the end")
    parser.add_argument("--clear", action="store_true", help="clear what --keep left, and do nothing else")
    parser.add_argument("--seed", type=int, default=1, help="for the contents of the files (default 1)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the disks lie")
    parser.add_argument("--svg", type=Path, metavar="PATH", help="also write the last screens there as a picture")
    parser.add_argument("--share", nargs="+", help=argparse.SUPPRESS)
    return parser


def _stop(number: int, _: object) -> NoReturn:
    # Once is enough: nothing may disturb the clearing up, here or in the programs it runs.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def _real(story: Story, arguments: argparse.Namespace) -> list[RenderableType]:
    from demo import scenes
    from demo.world import RealWorld

    screen = story.screen
    screen.say("storaged demo: a real disk, real btrfs, a real storaged in each guest", "bold")
    with RealWorld(arguments.dir, QUICK if arguments.quick else FULL, arguments.seed) as world:
        world.make()
        with screen.watching(world):
            scenes.prepare(story, world)
            for guest in world.guests:
                story.say(f"metrics of {guest.name}: curl http://{guest.metrics}/metrics")
            scenes.play(story, world)
            rows, totals = scenes.ending(story, world, keep=arguments.keep)
        parts = screen.table(rows, totals)
        if arguments.keep:
            world.keep()
            screen.say("\nAll of it is still running:")
            for guest in world.guests:
                screen.say(f"  {guest.name}: storagectl --guest {guest.daemon.address} watch", "")
                screen.say(f"           {guest.disk.mountpoint}")
                screen.say(f"           curl http://{guest.metrics}/metrics")
            screen.say(f"  the host's disk: df -h {world.host}")
            screen.say("To clear it: make demo ARGS=--clear")
    return parts


def _simulated(story: Story, arguments: argparse.Namespace, why: str) -> list[RenderableType]:
    from demo import simulated

    screen = story.screen
    screen.say("storaged demo, SIMULATED: real daemons, but their filesystems and the host's disk are made up", "bold")
    if why:
        screen.say(f"  (the real one cannot run here: {why})")
    with simulated.SimWorld(arguments.dir, QUICK if arguments.quick else FULL) as world:
        with screen.watching(world):
            for guest in world.guests:
                story.say(f"metrics of {guest.name}: curl http://{guest.metrics}/metrics")
            simulated.play(story, world)
            rows, totals = simulated.ending(story, world)
        return screen.table(rows, totals)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.dir.is_dir():
        parser.error(f"--dir {arguments.dir} is no directory")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a daemon that is killed on purpose is no news
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from demo import screen as screens
    from demo import world as worlds
    from demo.story import Story

    if arguments.share:
        path, unit, *sockets = arguments.share
        worlds.share_for_ever(Path(path), int(unit), [Path(each) for each in sockets])
        return 0
    cleared = worlds.sweep(arguments.dir, kept=arguments.clear)
    if arguments.clear:
        print(f"cleared {cleared} demos" if cleared != 1 else "cleared 1 demo")
        return 0
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _stop)
    unit = QUICK if arguments.quick else FULL
    why = "" if arguments.sim else worlds.why_not(arguments.dir, 5 * unit)
    story = Story(screens.Screen(), scenes=5)
    try:
        if arguments.sim or why:
            parts = _simulated(story, arguments, why)
        else:
            parts = _real(story, arguments)
    except Stopped as stopped:
        story.screen.say("stopped, and cleared up")
        return 128 + stopped.number
    except RuntimeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return FAILED
    return _verdict(story, parts, arguments.svg)


def _verdict(story: Story, parts: list[RenderableType], svg: Path | None) -> int:
    from rich.text import Text

    from demo.screen import save_svg

    claims = story.held + len(story.failures)
    verdict = f" {story.held} of {claims} claims held, in {story.screen.elapsed()}"
    style = "bold red" if story.failures else "bold green"
    story.screen.say(verdict, style)
    for failure in story.failures:
        story.screen.say(f"  ✗ {failure}", "red")
    if svg is not None:
        shown = [story.screen.tightest or Text(), *parts, Text(verdict, style=style)]
        save_svg(svg, shown, "make demo")
    return FAILED if story.failures else 0


if __name__ == "__main__":
    sys.exit(main())
