"""Backward vectors in, blocks of the GGN out."""
