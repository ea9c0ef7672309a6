"""One forward pass, watched: what became of parameters, and the way back through the graph."""
