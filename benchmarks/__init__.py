"""One script a claim; each prints what it measured and can write it as JSON."""
