"""Reports as documents for machines: plain data, read back by type, described by a JSON Schema."""
