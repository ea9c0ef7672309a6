"""The Laplace posterior N(θ*, P⁻¹), P = H/(σ²T) + diag δ: evidence, samples, predictives."""
