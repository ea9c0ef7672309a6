"""Predictions: outputs as Gaussians, samples, and what follows from them."""
