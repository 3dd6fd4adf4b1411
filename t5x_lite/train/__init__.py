"""Training: a state, one pure step for every loss, and the loop around it."""
