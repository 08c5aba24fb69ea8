"""Training: the loop, the optimizer step, a run's session, exports and profiles."""
