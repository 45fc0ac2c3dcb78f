"""The rest of the guest contract: network, processes, mounts, clock, power, containers, users.

Each module holds its own checks (pure, on frozen data) and its own effects (behind a Protocol where the world must be
replaced in tests and in the simulation). Nothing here knows gRPC.
"""
