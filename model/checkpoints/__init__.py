"""Checkpoints: records, weights, optimizer state, import from and export to Hugging Face."""
