"""Runs, sweeps and evaluations side by side: read, pooled, compared pair by pair, and shown."""
