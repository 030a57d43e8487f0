"""Training data: one global order of windows, and the batches that each rank takes from it."""
