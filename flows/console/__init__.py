"""The `gpt2` command.

To add a verb, write a function with `@app.command` in `cli.py` (pipeline), `models.py` (models) or `operations.py`
(inspection, clean-up, service), or with `@dataset_app.command` in `dataset.py` (writes) or `versions.py` (reads).
Parameters before `/` become arguments, keyword-only parameters options, with the help under Args in the docstring.
`settings: Settings = DEFAULTS` adds --config and --set. `cli.py` must import a new module of verbs.
"""
