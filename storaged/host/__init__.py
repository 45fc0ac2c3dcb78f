"""The host's side: one disk, many guests. Never imported by the guest's daemon."""
