"""Ranks, the launchers that start them, and the watchdog that finds lost ones."""
