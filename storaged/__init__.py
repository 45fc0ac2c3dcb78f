"""storaged: the storage of a virtual machine whose disk is promised, not owned."""

__version__ = "0.1.0"
