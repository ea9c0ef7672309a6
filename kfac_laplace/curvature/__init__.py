"""The backend: K-FAC-expand and K-FAC-reduce approximations of the GGN, and its exact relatives."""
