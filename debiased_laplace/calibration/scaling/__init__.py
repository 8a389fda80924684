"""One number that a baseline could have been corrected with: temperatures, and factors of standard deviations."""
