"""One run: checks, order of batches, checkpoints, output."""
