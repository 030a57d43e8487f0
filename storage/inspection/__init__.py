"""Read-only views of a sealed dataset. Nothing here writes to a dataset."""
