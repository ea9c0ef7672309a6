"""Experiments on training with hyperparameters that choose themselves; docs/results.md shows them.

An experiment is a grid of cells, each a training run or a few: `python -m benchmarks.experiments`.
"""
