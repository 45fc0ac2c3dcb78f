"""The process that makes the kernel's long calls, one at a time, asked for on its standard input.

It is started as a plain script by `btrfs.resizer` and imports nothing it does not need. Signals keep their default
action, so it can be killed in the middle of a call, and its death cancels what runs. It dies with the daemon: a
thread sees the end of standard input, even while a call runs.

Requests, a line each: `size N` resizes to N bytes, `move N` moves all there is out of the data chunk whose logical
address is N (a balance of that chunk alone), `metadata N` out of the metadata chunk there. Answers: the ioctl's return
value and errno, a line each.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import struct
import sys
import threading

IOC_RESIZE = 0x50009403
VOL_ARGS_SIZE = 4096
NAME_OFFSET = 8
IOC_BALANCE_V2 = 0xC4009420
BALANCE_ARGS_SIZE = 1024
BALANCE_DATA, BALANCE_METADATA = 1, 4
ARGS_VRANGE = 1 << 4
KIND_ARGS_SIZE = 136
"""btrfs_ioctl_balance_args: flags and state, 8 bytes each; then what is asked of data, of metadata, and of system."""
KIND_ARGS = struct.Struct("=9Q")
"""btrfs_balance_args up to its flags: profiles, usage, devid, pstart, pend; vstart, vend; target; flags."""


def _resize(devid: int, size: int) -> tuple[int, bytes]:
    argument = b"%d:%d" % (devid, size)
    return IOC_RESIZE, (bytes(NAME_OFFSET) + argument).ljust(VOL_ARGS_SIZE, b"\0")


def _move(kind: int, logical: int) -> tuple[int, bytes]:
    one = KIND_ARGS.pack(0, 0, 0, 0, 0, logical, logical + 1, 0, ARGS_VRANGE).ljust(KIND_ARGS_SIZE, b"\0")
    head = struct.pack("=QQ", kind, 0) + bytes(0 if kind == BALANCE_DATA else KIND_ARGS_SIZE)
    return IOC_BALANCE_V2, (head + one).ljust(BALANCE_ARGS_SIZE, b"\0")


def main() -> None:
    """Serve until standard input ends. argv: the open filesystem's descriptor, the device id."""
    fd, devid = int(sys.argv[1]), int(sys.argv[2])
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

    def listen() -> None:
        for line in sys.stdin.buffer:
            requests.put(line.strip())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        verb, number = requests.get().split()
        if verb == b"size":
            request, argument = _resize(devid, int(number))
        else:
            request, argument = _move(BALANCE_METADATA if verb == b"metadata" else BALANCE_DATA, int(number))
        buffer = ctypes.create_string_buffer(argument, len(argument))
        result = libc.ioctl(fd, request, ctypes.addressof(buffer))
        error = ctypes.get_errno() if result < 0 else 0
        os.write(1, b"%d %d\n" % (result, error))


if __name__ == "__main__":
    main()
