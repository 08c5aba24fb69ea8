"""Figures of a run: their record, the stopwatch, experiment trackers, benchmarks."""
