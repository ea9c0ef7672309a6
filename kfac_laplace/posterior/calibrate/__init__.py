"""Calibration: outputs at points that were left out or held out, and what is chosen by them."""
