"""What can be told about runs from the store alone, without Prefect."""
