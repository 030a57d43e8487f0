"""What the store alone says about runs and datasets, without Prefect. Only `garbage.collect` deletes anything."""
