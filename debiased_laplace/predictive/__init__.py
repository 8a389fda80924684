"""Predictions from a network and a posterior precision."""
