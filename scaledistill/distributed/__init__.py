"""Ranks, the launchers that start them, and the watchdog that detects lost ones."""
