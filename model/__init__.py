"""GPT-2: its configuration, training and evaluation. Never imports Prefect. README.md lists the modules.

`python -m model STORE JOB` runs one job. The modules that `flows` imports load no torch; import-linter checks it.
"""
