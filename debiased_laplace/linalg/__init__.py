"""Matrices only: no network, no data."""
