"""What the stages share while they run: task windows, child processes, progress, Prefect artifacts."""
