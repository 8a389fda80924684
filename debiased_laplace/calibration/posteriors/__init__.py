"""What was fitted: Laplace posteriors as plain numbers for the report."""
