"""What was predicted and what came, checked once: the only way into a report."""
