"""The guest module against the kernel it will meet."""
