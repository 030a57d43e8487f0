"""GPT-2: its configuration, training and evaluation. Never imports Prefect. README.md lists the modules."""
