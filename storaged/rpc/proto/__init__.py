"""The wire: the .proto files, and the modules that `make proto` generates from them."""
