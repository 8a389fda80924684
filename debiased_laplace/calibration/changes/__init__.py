"""What changed between two stored reports."""
