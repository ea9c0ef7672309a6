"""The caller's model and data: running the one, reading the other, leaving both as they were."""
