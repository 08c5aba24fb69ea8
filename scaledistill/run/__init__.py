"""A run's folder: its owner, its status, requests to stop, and how to resume."""
