"""Saved adapters: export, prune, verify, inspect, read a folder, load over a base model."""
