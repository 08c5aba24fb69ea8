"""Files that survive crashes, locks, and remote stores read through a verified cache."""
