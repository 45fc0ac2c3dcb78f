"""The demonstration: a host disk that fills up, two guests that were promised more than it has."""
