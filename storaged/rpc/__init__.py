"""The front: gRPC services that decode, call the house and encode."""
