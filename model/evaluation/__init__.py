"""Evaluation: each kind is a job and runs in its own process."""
