"""Everything at once: writers of every kind, an administrator's commands, kills, and a host that keeps reporting."""
