"""Marginal-likelihood training: hyperparameters choose themselves while the network trains."""
