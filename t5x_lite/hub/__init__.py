"""Published checkpoints: Hugging Face directories to t5x_lite's checkpoints and back."""
