"""Publish a student: exports in other formats, with measurements, and uploads to the hub."""
