"""Real filesystems on loop devices and real daemons, for tests, demo and benchmarks; never part of the product."""
