"""The units under a real service manager, in a container of this machine's own system."""
