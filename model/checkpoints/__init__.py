"""Checkpoints: the record that makes one count, its weights and optimizer state, and Hugging Face's layout."""
