"""Samples: where they come from, what they are known by, and which do what."""
