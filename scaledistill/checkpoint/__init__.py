"""Checkpoints: their format, saving in the background, and copies in other places."""
