"""Linear algebra on matrices, independent of networks and data."""
