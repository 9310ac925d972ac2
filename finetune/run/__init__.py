"""Runs: directory, lock, checkpoints, metrics, provenance, trackers and ranks."""
