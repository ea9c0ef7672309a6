"""Gradients of a recorded pass, by group of parameters and by example."""
