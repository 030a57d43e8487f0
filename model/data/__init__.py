"""Training data as tensors: each rank's batches."""
