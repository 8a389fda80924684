"""The curvature of sets of samples, and how the network is differentiated for it."""
