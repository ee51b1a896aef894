"""Data in, a trained adapter out: one small file per kind of task."""
