"""The debiased estimator: directions from some samples, magnitudes from others."""
