"""Training data: the global window order, and each rank's batches."""
