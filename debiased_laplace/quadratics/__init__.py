"""The quadratic of a set of samples around the weights, matrix-free: value, slope and curvature."""
