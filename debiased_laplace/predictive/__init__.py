"""From a network and a posterior precision to predictions."""
