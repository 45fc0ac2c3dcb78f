"""Two hours of a host with a disk that is promised more than once: how different sharers fare on the same demands."""
