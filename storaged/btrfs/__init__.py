"""The only place that knows an ioctl: space, layout, resize, discard, capacity events."""
