"""Distillation inside other libraries: `transformers.Trainer`."""
