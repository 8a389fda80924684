"""Matrix-free quadratic models of the loss of a set of samples: value, slopes and curvatures."""
