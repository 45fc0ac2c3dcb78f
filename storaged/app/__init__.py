"""Puts the rooms together: the only package that names the adapters, and the daemon's life from start to stop."""

from storaged.app.daemon import run, serve
from storaged.app.guest import GuestModules, real_guest, sim_guest
from storaged.app.options import Options
from storaged.app.worlds import real_world, sim_world, uninstall

__all__ = [
    "GuestModules",
    "Options",
    "real_guest",
    "real_world",
    "run",
    "serve",
    "sim_guest",
    "sim_world",
    "uninstall",
]
