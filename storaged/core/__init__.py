"""What storage should do: pure decisions, no I/O, no clock."""
