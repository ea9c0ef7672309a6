"""Training with K-FAC: factors of the training pass, rules that turn gradients into updates."""
