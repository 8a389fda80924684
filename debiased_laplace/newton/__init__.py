"""Newton steps whose directions and step lengths come from different samples, and an optimizer made of them."""
