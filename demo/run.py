"""`make demo`: the main job, for real, in under a minute.

A host's disk of 4 GiB carries the sparse images of two guests that were promised 4 GiB each. The host fills up, a guest
writes at full speed, files are deleted, a guest is resized, a daemon is killed. Every claim is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import scenes, sim
from demo.screen import Screen
from demo.world import Host, Member, build_host, build_member, watched
from lab.loop import PREFIX, clear, run, sweep, workspace
from storaged.btrfs.system import ProcSysctl
from storaged.core.model import DirtyLimits

KEPT = "kept.json"


class Interrupted(Exception):
    """SIGTERM, as an exception so that everything is cleaned up."""


def why_not_real() -> str:
    """Why this machine cannot show the real thing; empty when it can."""
    if os.geteuid() != 0:
        return "it needs root"
    if not Path("/dev/loop-control").exists():
        return "it needs loop devices"
    try:
        with workspace() as directory:
            image = directory / "probe.img"
            with image.open("wb") as file:
                file.truncate(256 << 20)
            run("mkfs.btrfs", "-q", image)
            (directory / "probe").mkdir()
            run("mount", "-o", "loop", image, directory / "probe")
    except (RuntimeError, OSError) as error:
        return f"btrfs does not work here: {error}"
    return ""


@contextlib.contextmanager
def stage(*, keep: bool) -> Iterator[Path]:
    """A workspace that is cleared on the way out, unless it is to be kept and all went well."""
    if not keep:
        with workspace() as directory:
            yield directory
        return
    directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    try:
        yield directory
    except BaseException:
        clear(directory)
        raise


def clear_kept(under: Path) -> int:
    """Stop and remove what `--keep` left; how many stages there were."""
    count = 0
    for note in under.glob(f"{PREFIX}*/{KEPT}"):
        kept = json.loads(note.read_text(encoding="utf-8"))
        for pid in kept["pids"]:
            with contextlib.suppress(OSError):
                # Ours only: the number may belong to somebody else by now.
                if b"storaged" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGTERM)
        time.sleep(1)
        ProcSysctl().set_dirty_limits(DirtyLimits(**kept["dirty_limits"]))
        clear(note.parent)
        count += 1
    return count


def real(screen: Screen, *, keep: bool) -> list[str]:
    """All acts; the claims that did not hold."""
    with stage(keep=keep) as directory, contextlib.ExitStack() as cleanup:
        with screen:
            screen.say("setting the stage: a host's disk, two guests, a storaged in each")
            # The guests of a demo share this machine's write-back limits; a daemon that is killed puts none back.
            sysctl = ProcSysctl()
            found = sysctl.dirty_limits()
            cleanup.callback(sysctl.set_dirty_limits, found)
            disk = build_host(directory)
            members: list[Member] = []
            for name in ("a", "b"):
                member = build_member(directory, disk, name)
                members.append(member)
                cleanup.callback(member.daemon.kill)
                member.daemon.start()
            prometheus = watched(directory, [(member.name, member.metrics) for member in members])
            if prometheus is not None:
                cleanup.callback(prometheus.stop)
                screen.say(f"Prometheus with storaged's rules and alerts watches: {prometheus.url}")
            host = Host(disk, members)
            cleanup.callback(host.stop)
            play = scenes.Play(screen, host, members[0], members[1])
            stop = threading.Event()
            painter = threading.Thread(target=play.watch, args=(stop,), daemon=True)
            painter.start()
            try:
                for act in scenes.ACTS:
                    act(play)
            finally:
                stop.set()
                painter.join()
        host.stop()
        scenes.summary(play)
        for member in members:
            screen.console.print(
                f"metrics of guest {member.name}: curl http://{member.metrics}/metrics", soft_wrap=True
            )
        if keep:
            cleanup.pop_all()
            pids = [member.daemon.pid for member in members]
            if prometheus is not None:
                pids.append(prometheus.pid)
                screen.console.print(f"Prometheus: {prometheus.url}", soft_wrap=True)
            kept = {"pids": pids, "dirty_limits": asdict(found)}
            (directory / KEPT).write_text(json.dumps(kept), encoding="utf-8")
            for member in members:
                screen.console.print(
                    f"guest {member.name}: storagectl --guest {member.daemon.address} status", soft_wrap=True
                )
            screen.console.print("left running; `make demo ARGS=--clear` removes it", soft_wrap=True)
    return play.failed


def main() -> int:
    """0 when every claim held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sim", action="store_true", help="on a simulated filesystem, without root")
    parser.add_argument("--keep", action="store_true", help="leave everything running")
    parser.add_argument("--clear", action="store_true", help="remove what --keep left, and stop")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="also save what is printed as a picture")
    arguments = parser.parse_args()

    def interrupted(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGTERM, interrupted)
    kept = clear_kept(Path(tempfile.gettempdir()))
    sweep()
    if arguments.clear:
        print(f"demo: {kept} kept stage(s) removed")
        return 0
    screen = Screen(record=arguments.svg is not None)
    reason = "" if arguments.sim else why_not_real()
    try:
        if arguments.sim or reason:
            if reason:
                screen.console.print(f"demo: simulated, because {reason}")
            with workspace() as directory:
                failed = sim.play(screen, directory)
        else:
            failed = real(screen, keep=arguments.keep)
    except (KeyboardInterrupt, Interrupted):
        print("demo: stopped; everything is cleaned up", file=sys.stderr)
        return 130
    if arguments.svg is not None:
        screen.save_svg(arguments.svg)
    for claim in failed:
        print(f"demo: did not hold: {claim}", file=sys.stderr)
    screen.console.print("demo: every claim held" if not failed else f"demo: {len(failed)} claim(s) did not hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
