"""Policies that learn on OpenRLHF: its Ray actors, its trainer, DeepSpeed."""
