"""Checkpoints: their format, saving beside training, and copies in other places."""
