"""Whole runs on a real btrfs: what the kernel does, not what a model of it says."""
