"""The tests mirror the package; `cases`, `oracles` and `laws` are what they share."""
