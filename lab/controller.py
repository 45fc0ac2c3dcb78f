"""`storaged-host serve` with a configuration that is made here, for guests that are named."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from lab.host import HostDaemon
from storaged.rpc.proto import storaged_host_v1_pb2 as pb

OVER = frozenset({pb.RESIZE_DONE, pb.RESIZE_FAILED, pb.RESIZE_CANCELLED})


@dataclass(frozen=True, slots=True)
class Entry:
    """A guest as its host's configuration names it."""

    name: str
    address: str
    image: Path
    weight: float = 1.0


class Controller(HostDaemon):
    """The host's daemon for `guests` on one pool, the filesystem that `pool` lies on. `sharing`: that table's lines."""

    def __init__(self, directory: Path, pool: Path, guests: list[Entry], sharing: str, metrics: str) -> None:
        control, config = directory / "host.sock", directory / "host.toml"
        tables = [
            f'[serve]\nlisten = ["unix:{control}"]\nmetrics = "{metrics}"',
            f'[resize]\nstate_dir = "{directory}/host-state"\npoll_s = 0.05',
            f"[sharing]\n{sharing.strip()}",
            f'[pool.vms]\npath = "{pool}"',
            *(
                f'[guest."{one.name}"]\naddress = "{one.address}"\nimage = "{one.image}"\nweight = {one.weight}'
                for one in guests
            ),
        ]
        config.write_text("\n".join(tables) + "\n", encoding="utf-8")
        super().__init__(config, directory / "host.log", control)
        self._names = {one.name for one in guests}

    def start(self) -> None:
        """Start it and wait until every guest has its grant. Raises RuntimeError with its log when that fails."""
        super().start()
        self._wait(self._granted)

    def _granted(self) -> bool:
        try:
            guests = self.guests().values()
        except grpc.RpcError:
            return False
        # One that has reported is one whose balloon is known, too.
        return {one.name for one in guests if one.HasField("grant_bytes") and not one.stale_reason} == self._names

    def resize(self, name: str, size: int, within_s: float = 60.0) -> pb.Resize:
        """Resize a guest, image and filesystem; how it ended."""
        begun = self.stub.Resize(pb.ResizeRequest(guest=name, size_bytes=size), timeout=20).resize
        until = time.monotonic() + within_s
        for report in self.stub.Watch(pb.WatchRequest(history_once=True), timeout=within_s):
            found = next(one for one in report.resizes if one.id == begun.id)
            if found.state in OVER:
                return found
            if time.monotonic() > until:
                break
        raise TimeoutError(f"{name} is still being resized to {size}")
