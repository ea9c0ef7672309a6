"""Linear algebra without models: packed storage, Gram matrices, spectra, and their dtypes."""
