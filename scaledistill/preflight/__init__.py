"""What is settled and checked before a run: settings, models, data, memory, the plan."""
