"""What a model or a baseline scores on held-out data."""
