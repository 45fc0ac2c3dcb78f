"""Resize jobs: bounds and states are pure, the runner drives the kernel, the journal survives a crash."""
