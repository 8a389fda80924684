"""Curvature of sets of samples, and the derivatives of the network that it needs."""
