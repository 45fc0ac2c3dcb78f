# ruff: noqa: N802  # methods are named as in the contract
"""A daemon that says what a test tells it to: for what a real one says only on a bad day."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import storaged_v1_pb2_grpc, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.units import GIB, MIB


def report(job: pb.Job | None = None, *, size: int = 8 * GIB) -> pb.Report:
    """A plausible report."""
    return pb.Report(
        sequence=7,
        time=Timestamp(seconds=1_700_000_100),
        version="0.1.0",
        pressure=pb.Pressure(
            level=pb.LEVEL_LOW, host_free_bytes=3 * GIB // 2, reported_at=Timestamp(seconds=1_700_000_000)
        ),
        filesystem=pb.Filesystem(
            mountpoint="/mnt/stateful",
            size_bytes=size,
            device_bytes=8 * GIB,
            available_bytes=GIB // 2,
            data_total_bytes=5 * GIB,
            data_used_bytes=4 * GIB,
            metadata_total_bytes=256 * MIB,
            metadata_used_bytes=20 * MIB,
            unallocated_bytes=2 * GIB,
            discard_supported=True,
        ),
        balloon=pb.Balloon(size_bytes=2 * GIB, target_bytes=2 * GIB, limit_bytes=GIB // 2),
        job=job,
        bounds=pb.Bounds(minimum_size=3 * GIB, guaranteed_size=6 * GIB, why="a data chunk ends at 3221225472"),
        notes=["shrink from 8.00 GiB to 4.00 GiB begins"],
    )


def job(state: pb.JobState.ValueType = pb.JOB_RUNNING, *, key: str = "new", **fields: Any) -> pb.Job:
    """A shrink from 8 to 4 GiB that moves 2 GiB."""
    known: dict[str, Any] = {
        "direction": pb.DIRECTION_SHRINK,
        "start_size": 8 * GIB,
        "requested_size": 4 * GIB,
        "current_size": 6 * GIB,
        "moved_bytes": 850 * MIB,
        "total_to_move_bytes": 2 * GIB,
        "progress": 0.415,
        "rate_bytes_per_s": 120.5 * MIB,
        "eta_s": 204.0,
        "started_at": Timestamp(seconds=1_700_000_050),
    }
    if state in (pb.JOB_DONE, pb.JOB_FAILED, pb.JOB_CANCELLED):
        known |= {"ended_at": Timestamp(seconds=1_700_000_090), "rate_bytes_per_s": None, "eta_s": None}
    if state == pb.JOB_DONE:
        known |= {"current_size": 4 * GIB, "progress": 1.0, "moved_bytes": 2 * GIB}
    return pb.Job(id=key, state=state, **(known | fields))


class Fake(storaged_v1_pb2_grpc.StorageServicer, vm_guest_pb2_grpc.MaitredServicer):
    """Answers with `now`, streams what was sent."""

    def __init__(self) -> None:
        self.now = report()
        self._reports: list[pb.Report | None] = []
        self._begin = 0
        self.started = True
        self.held = True
        self.minimum = 3 * GIB
        self.error: tuple[grpc.StatusCode, str] | None = None
        self.cancel_answer: pb.Job | None = None
        self.cancel_asked = threading.Event()
        self.asked: list[Any] = []

    def send(self, *reports: pb.Report | None) -> None:
        """Tell whoever watches, now or later; None ends the stream, and the next one begins after it."""
        self._reports.extend(reports)

    def forget(self) -> None:
        """Send nothing of what was sent to those who come later."""
        self._begin = len(self._reports)

    def GetReport(self, request: pb.GetReportRequest, context: Any) -> pb.Report:
        self._fail(context)
        return self.now

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Report]:
        self.asked.append(request)
        at = self._begin
        while context.is_active():
            if at >= len(self._reports):
                time.sleep(0.02)
                continue
            item = self._reports[at]
            at += 1
            if item is None:
                self._begin = at
                return
            yield item

    def Resize(self, request: pb.ResizeRequest, context: Any) -> pb.ResizeResponse:
        self.asked.append(request)
        return pb.ResizeResponse(job=job())

    def CancelResize(self, request: pb.CancelResizeRequest, context: Any) -> pb.CancelResizeResponse:
        self.cancel_asked.set()
        while self.cancel_answer is None and context.is_active():
            time.sleep(0.05)
        return pb.CancelResizeResponse(job=self.cancel_answer)

    def Trim(self, request: pb.TrimRequest, context: Any) -> pb.TrimResponse:
        self.asked.append(request)
        self._fail(context)
        return pb.TrimResponse(trimmed_bytes=5 * MIB)

    def ResizeFilesystem(self, request: Any, context: Any) -> vm_guest_pb2.ResizeFilesystemResponse:
        self.asked.append(request)
        answer = vm_guest_pb2.ResizeFilesystemResponse
        return answer(status=answer.STARTED if self.started else answer.ALREADY_IN_PROGRESS)

    def GetResizeBounds(self, request: Any, context: Any) -> vm_guest_pb2.GetResizeBoundsResponse:
        return vm_guest_pb2.GetResizeBoundsResponse(minimum_size=self.minimum)

    def UpdateStorageBalloon(self, request: Any, context: Any) -> vm_guest_pb2.UpdateStorageBalloonResponse:
        self.asked.append(request)
        result = vm_guest_pb2.SUCCESS if self.held else vm_guest_pb2.BALLOON_INFLATE_FAILED
        return vm_guest_pb2.UpdateStorageBalloonResponse(result=result)

    def _fail(self, context: Any) -> None:
        if self.error is not None:
            context.abort(*self.error)


class FakeDaemon:
    """A Fake on a unix socket, or on `bind`, in `with`; `stop` and `start` are its crash and its return."""

    def __init__(self, directory: Path, bind: str = "", *, without_storage: bool = False) -> None:
        self.says = Fake()  # type: ignore[abstract]  # the rest answers UNIMPLEMENTED
        self._without_storage = without_storage
        self._bind = bind or f"unix:{directory / 'fake.sock'}"
        self.address = self._bind
        self._server: grpc.Server | None = None

    def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        """Serve."""
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        if not self._without_storage:
            storaged_v1_pb2_grpc.add_StorageServicer_to_server(self.says, self._server)
        vm_guest_pb2_grpc.add_MaitredServicer_to_server(self.says, self._server)
        if credentials is not None:
            port = self._server.add_secure_port(self._bind, credentials)
        else:
            port = self._server.add_insecure_port(self._bind)
        if not self._bind.startswith("unix:"):
            self.address = f"tcp:{self._bind.rpartition(':')[0]}:{port}"
        self._server.start()

    def stop(self) -> None:
        """Go away at once."""
        if self._server is not None:
            self._server.stop(0).wait(5)
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
