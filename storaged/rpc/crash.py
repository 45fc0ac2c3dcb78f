"""Tells the host's crash listener which program ended though it should not have."""

from __future__ import annotations

import grpc
import grpc.aio

from storaged.errors import Kind, StoragedError

CRASH_LISTENER_PORT = 7779
"""On the host's vsock."""


class CrashReports:
    """Reports to the listener at a gRPC target: `unix:/path` or `HOST:PORT`. A call is a `processes.Report`."""

    def __init__(self, target: str, call_s: float = 5.0) -> None:
        self._target = target
        self._call_s = call_s

    async def __call__(self, name: str) -> None:
        # Loaded at the first report: most guests never send one.
        from storaged.rpc.proto import vm_crash_pb2, vm_crash_pb2_grpc

        async with grpc.aio.insecure_channel(self._target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: vm_crash_pb2_grpc.CrashListenerAsyncStub = vm_crash_pb2_grpc.CrashListenerStub(channel)
            try:
                await stub.SendFailureReport(vm_crash_pb2.FailureReport(failed_process=name), timeout=self._call_s)
            except grpc.aio.AioRpcError as error:
                raise StoragedError(
                    f"{self._target}: {error.code().name} {error.details()}", Kind.UNAVAILABLE
                ) from error
