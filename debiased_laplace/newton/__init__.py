"""Newton steps with directions and step lengths from different samples, and an optimizer that takes them."""
