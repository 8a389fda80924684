"""From methods and a loader to predictions: one pass, the same inputs and the same random numbers for all."""
