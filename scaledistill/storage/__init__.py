"""Durable files, file locks, and remote stores read through a verified cache."""
