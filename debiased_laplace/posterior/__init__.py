"""The posteriors that users hold, each a laplace-torch `ParametricLaplace`."""
