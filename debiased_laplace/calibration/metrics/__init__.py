"""From predictions to estimates, and to what the figures show."""
