"""A login manager on a bus of its own: what it is asked, it writes down. Run as `logind.py ADDRESS LOG ANSWER`."""

from __future__ import annotations

import sys
from pathlib import Path

from jeepney import DBusAddress, MessageType, new_error, new_method_call, new_method_return
from jeepney.io.blocking import open_dbus_connection

NAME = "org.freedesktop.login1"
BUS = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")


def main(address: str, log: Path, answer: str) -> None:
    """Own the name, then answer CanPowerOff with `answer` and PowerOff with success, or an error for `refuse`."""
    with open_dbus_connection(bus=address) as connection:
        connection.send_and_get_reply(new_method_call(BUS, "RequestName", "su", (NAME, 4)))
        log.write_text("ready\n", encoding="ascii")
        while True:
            message = connection.receive()
            if message.header.message_type is not MessageType.method_call:
                continue
            member = message.header.fields[3]
            with log.open("a", encoding="ascii") as file:
                file.write(f"{member}{message.body}\n")
            if member == "CanPowerOff":
                connection.send(new_method_return(message, "s", (answer if answer != "refuse" else "yes",)))
            elif answer == "refuse":
                connection.send(new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "s", ("not today",)))
            else:
                connection.send(new_method_return(message))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
