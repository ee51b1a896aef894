"""Initialisers: starts of an adapter from the model's own gradient."""
