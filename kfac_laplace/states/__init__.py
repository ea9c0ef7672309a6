"""What was computed, as tensors and plain data: compared, sealed, checked, written and read."""
