"""`make demo`: the main job, for real, in under a minute.

A host's disk of 5 GiB carries the sparse images of two guests that were promised 4 GiB each. storaged-host shares what
there is; the host fills up, a guest writes at full speed, files are deleted, a guest is resized with storagectl, a
guest's daemon and storaged-host are killed. Every claim is checked.
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
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import scenes, sim
from demo.screen import Screen
from demo.world import HOST_DISK, Host, Member, build_host, build_member, watched
from lab.host import console_link
from lab.loop import PREFIX, clear, host_disk, run, sweep, workspace
from lab.prometheus import Prometheus
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


def answers(play: scenes.Play, prometheus: Prometheus | None) -> None:
    """Everything whose address is printed answers, and Prometheus has seen all three."""
    host = play.host
    play.check("the console answers", b'id="guests"' in _signed_in(console_link(host.daemon.address)))
    addresses = [("the host", host.metrics, b"storaged_host_pool_promised_bytes")]
    addresses += [(f"guest {each.name}", each.metrics, b"storaged_balloon_size_bytes") for each in (play.a, play.b)]
    for name, metrics, series in addresses:
        play.check(f"metrics of {name} answer", series in _fetch(f"http://{metrics}/metrics"))
    if prometheus is None:
        return
    until, up = time.monotonic() + 10, ""
    while up != "3" and time.monotonic() < until:
        time.sleep(0.5)
        found = prometheus.at("sum(up)", time.time())
        up = found[0]["values"][0][1] if found else ""
    play.check("Prometheus scrapes the host and both guests", up == "3")


def _signed_in(link: str) -> bytes:
    """The console's page, as a browser gets it that follows the link."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    try:
        with browser.open(link, timeout=10) as page:
            body: bytes = page.read()
    except OSError:
        return b""
    return body


def _fetch(url: str) -> bytes:
    """What an address of ours answers; nothing when it does not."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310
            body: bytes = page.read()
    except OSError:
        return b""
    return body


def reached(screen: Screen, host: Host, members: list[Member], prometheus: Prometheus | None) -> None:
    """Where everything can be looked at; asks each metrics address, as a claim that it answers."""
    signs_in = f"storagectl --host {host.daemon.address} console"
    lines = [f"console: {host.console} (sign in: {signs_in})", f"host: storagectl --host {host.daemon.address} watch"]
    lines += [f"guest {member.name}: storagectl --guest {member.daemon.address} status" for member in members]
    lines.append(f"metrics of the host: curl http://{host.metrics}/metrics")
    lines += [f"metrics of guest {member.name}: curl http://{member.metrics}/metrics" for member in members]
    if prometheus is not None:
        lines.append(f"Prometheus: {prometheus.url}")
    for line in lines:
        screen.console.print(line, soft_wrap=True)


def real(screen: Screen, *, keep: bool) -> list[str]:
    """All acts; the claims that did not hold."""
    with stage(keep=keep) as directory, contextlib.ExitStack() as cleanup:
        with screen:
            screen.say("setting the stage: a host's disk, two guests, a storaged in each")
            # The guests of a demo share this machine's write-back limits; a daemon that is killed puts none back.
            sysctl = ProcSysctl()
            found = sysctl.dirty_limits()
            cleanup.callback(sysctl.set_dirty_limits, found)
            disk = host_disk(directory, HOST_DISK)
            members: list[Member] = []
            for name in ("a", "b"):
                member = build_member(directory, disk, name)
                members.append(member)
                cleanup.callback(member.daemon.kill)
                member.daemon.start()
            host = build_host(directory, disk, members)
            cleanup.callback(host.daemon.end, signal.SIGTERM)
            cleanup.callback(host.stop_looking)
            prometheus = watched(directory, [(member.name, member.metrics) for member in members], host.metrics)
            if prometheus is not None:
                cleanup.callback(prometheus.stop)
                screen.say(f"Prometheus with storaged's rules and alerts watches: {prometheus.url}")
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
        host.stop_looking()
        scenes.summary(play)
        answers(play, prometheus)
        reached(screen, host, members, prometheus)
        if keep:
            cleanup.pop_all()
            pids = [host.daemon.pid, *(member.daemon.pid for member in members)]
            if prometheus is not None:
                pids.append(prometheus.pid)
            kept = {"pids": pids, "dirty_limits": asdict(found)}
            (directory / KEPT).write_text(json.dumps(kept), encoding="utf-8")
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
