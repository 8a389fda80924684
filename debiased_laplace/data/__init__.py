"""Data: batches, loaders, identities of samples, and their split into sub-batches."""
