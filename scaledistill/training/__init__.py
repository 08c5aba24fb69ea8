"""The loop, the step, and what belongs to a run while it trains."""
