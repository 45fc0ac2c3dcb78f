"""From a launch's message to the guest module's value, and back."""

from __future__ import annotations

from storaged.guest.processes import Launch, Outcome, parse_launch
from storaged.rpc.proto import vm_guest_pb2


def launch(request: vm_guest_pb2.LaunchProcessRequest) -> Launch:
    """What to start. Raises InvalidRequest."""
    return parse_launch(
        request.argv,
        request.env,
        respawn=request.respawn,
        console=request.use_console,
        wait=request.wait_for_exit,
    )


def launched(outcome: Outcome) -> vm_guest_pb2.LaunchProcessResponse:
    """What became of it."""
    return vm_guest_pb2.LaunchProcessResponse(
        status=outcome.status.value,  # type: ignore[arg-type]  # the guest module's numbers are the contract's
        code=outcome.code,
    )
