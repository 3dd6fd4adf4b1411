"""What a trained model does for its user."""
