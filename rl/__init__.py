"""Rollouts, the episode store, and training."""
