"""Directions from some samples, magnitudes from others: the idea of the package."""
