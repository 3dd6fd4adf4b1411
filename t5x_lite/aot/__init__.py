"""Programs as the compiler sees them: what they hold, compute and send, without running them."""
