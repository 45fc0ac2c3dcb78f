"""The process that calls the kernel's resize, one call at a time, asked for on its standard input.

It is started as a plain script by `btrfs.resizer` and imports nothing it does not need. Signals keep their default
action, so it can be killed in the middle of a call, and its death cancels the shrink. It dies with the daemon: a
thread sees the end of standard input, even while a call runs.

Requests: one size in bytes a line. Answers: the ioctl's return value and errno, a line each.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading

IOC_RESIZE = 0x50009403
VOL_ARGS_SIZE = 4096
NAME_OFFSET = 8


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
        argument = b"%d:%s" % (devid, requests.get())
        buffer = ctypes.create_string_buffer(VOL_ARGS_SIZE)
        ctypes.memmove(ctypes.addressof(buffer) + NAME_OFFSET, argument, len(argument))
        result = libc.ioctl(fd, IOC_RESIZE, ctypes.addressof(buffer))
        number = ctypes.get_errno() if result < 0 else 0
        os.write(1, b"%d %d\n" % (result, number))


if __name__ == "__main__":
    main()
