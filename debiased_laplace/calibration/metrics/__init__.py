"""From predictions to numbers: every metric with the estimator that suits it, and what the figures show."""
