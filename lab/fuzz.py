"""Coverage-guided fuzzing of everything that reads what others wrote: requests, settings, journals, addresses.

    python -m lab.fuzz [--runs N] [TARGET...]

Each target runs in a process of its own under atheris; a request goes through the real servicer over a simulated guest.
Whatever the bytes say, the answer is a result or a StoragedError: anything else is a finding, kept in
`build/fuzz/TARGET`. The number of inputs tried is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FINDINGS = ROOT / "build" / "fuzz"
RUNS = 20_000
CALL_WITHIN_S = 5.0
LONGEST = 4096
Target = Callable[[bytes], None]


def _rpc(method: str) -> tuple[Target, list[bytes]]:
    """A method of Maitred over a simulated guest, and requests that it takes."""
    from lab.requests import SEEDS, request_type, servicer
    from storaged.errors import StoragedError

    loop = asyncio.new_event_loop()
    context = SimpleNamespace(trailing_metadata=tuple, set_trailing_metadata=lambda _: None)
    maitred = loop.run_until_complete(servicer())
    kind = request_type(method)

    async def call(request: Any) -> None:
        asking = asyncio.ensure_future(getattr(maitred, method)(request, context))
        done, _ = await asyncio.wait({asking}, timeout=CALL_WITHIN_S)
        if not done:
            asking.cancel()  # a program that was asked to be waited for
        await asyncio.gather(asking, return_exceptions=True)
        if done and (error := asking.exception()) is not None and not isinstance(error, StoragedError):
            raise error

    def target(data: bytes) -> None:
        from google.protobuf.message import DecodeError

        try:
            request = kind.FromString(data)
        except DecodeError:
            return
        loop.run_until_complete(call(request))

    return target, [seed.SerializeToString() for seed in SEEDS if isinstance(seed, kind)]


def _text(parse: Callable[[str], object], *seeds: str) -> tuple[Target, list[bytes]]:
    """What reads a text."""
    from storaged.errors import StoragedError

    def target(data: bytes) -> None:
        with contextlib.suppress(StoragedError):
            parse(data.decode("utf-8", "surrogateescape"))

    return target, [seed.encode() for seed in seeds]


def _journal(text: str) -> None:
    from storaged.core.record import from_record
    from storaged.errors import InvalidRequest

    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict):
        try:
            from_record(record, 0.0)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error


def _settings(text: str) -> None:
    from storaged import config

    try:
        tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, UnicodeError):
        return
    with tempfile.NamedTemporaryFile("w", suffix=".toml", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        config.load(file.name)


def _cmdline(text: str) -> None:
    from storaged import cmdline

    cmdline.parse(text)


def _startup(text: str) -> None:
    from storaged.rpc.startup import read_request

    with tempfile.NamedTemporaryFile("w", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        read_request(file.name)


def _made(name: str) -> tuple[Target, list[bytes]]:
    """The target of that name, and inputs to begin with."""
    from storaged.addresses import parse_address
    from storaged.units import parse_size

    match name:
        case "address":
            return _text(parse_address, "unix:/run/s", "tcp:[::1]:80", "tcp:localhost:1", "vsock:2:8888")
        case "size":
            return _text(parse_size, "12GiB", "1.5 MB", "4096")
        case "journal":
            return _text(_journal, '{"version": 1, "limit": 5, "level": 1, "job": null}')
        case "settings":
            return _text(_settings, '[serve]\nlisten = ["unix:/s"]\n[storage]\nreserve = "2GiB"\nsettle_s = 1.5\n')
        case "cmdline":
            return _text(_cmdline, "quiet maitred.listen_port=8888 maitred.no_startup_processes ro")
        case "everything":
            return _everything()
        case "startup":
            return _text(_startup, 'argv: "ls"\nenv { key: "A" value: "b" }\nrespawn: true\n')
    return _rpc(name)


def _everything() -> tuple[Target, list[bytes]]:
    """All targets in one: the first byte says which."""
    made = [_made(name) for name in targets()]

    def target(data: bytes) -> None:
        if data:
            made[data[0] % len(made)][0](data[1:])

    return target, [bytes([number]) + seed for number, (_, seeds) in enumerate(made) for seed in seeds]


def targets() -> Iterator[str]:
    """Their names."""
    from lab.requests import METHODS

    yield from ("address", "size", "journal", "settings", "cmdline", "startup")
    yield from METHODS


def _fuzz(name: str, runs: int, corpus: str) -> None:
    """Never returns: atheris ends the process."""
    import atheris

    with atheris.instrument_imports(include=["storaged"], exclude=["storaged.rpc.proto"]):
        target, seeds = _made(name)
    if os.environ.get("STORAGED_FUZZ_BREAKS") == name:

        def target(_: bytes) -> None:
            raise AssertionError("broken on purpose")

    for number, seed in enumerate(seeds):
        (Path(corpus) / f"seed{number}").write_bytes(seed)
    FINDINGS.mkdir(parents=True, exist_ok=True)
    prefix = f"-artifact_prefix={FINDINGS / name}-"
    atheris.Setup([sys.argv[0], f"-runs={runs}", f"-max_len={LONGEST}", "-seed=1", prefix, corpus], target)
    atheris.Fuzz()


def run(name: str, runs: int) -> tuple[int, str]:
    """Inputs tried, and what was found: empty when nothing was."""
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, "-m", "lab.fuzz", "--one", name, "--runs", str(runs), "--corpus", corpus]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    said = done.stdout + done.stderr
    tried = re.findall(r"^Done (\d+) runs", said, re.MULTILINE)
    if done.returncode == 0 and tried:
        return int(tried[-1]), ""
    tried = re.findall(r"^#(\d+)", said, re.MULTILINE)
    return int(tried[-1]) if tried else 0, said[-3000:]


def main() -> int:
    """Fuzz what was asked for; 1 when anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--runs", type=int, default=RUNS, help="inputs for each target (default %(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        _fuzz(arguments.one, arguments.runs, arguments.corpus)
    total = wrong = 0
    for name in arguments.targets or targets():
        tried, finding = run(name, arguments.runs)
        total += tried
        wrong += bool(finding)
        print(f"fuzz: {name}: {tried} inputs,", f"FOUND:\n{finding}" if finding else "nothing found", flush=True)
    print(f"fuzz: {total} inputs in all, {wrong} targets with findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
