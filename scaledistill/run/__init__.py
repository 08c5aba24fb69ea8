"""A run's folder: who owns it, how the run stands, requests to stop."""
