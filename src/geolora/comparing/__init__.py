"""A grid of runs, and what follows from it."""
