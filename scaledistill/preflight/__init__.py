"""Everything before a run: resolving and checking settings, models, data and memory; the plan."""
