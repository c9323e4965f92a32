"""Plan -> training step."""
