"""Metrics of a run: their record, the stopwatch, experiment trackers, benchmarks."""
