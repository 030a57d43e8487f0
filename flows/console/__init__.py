"""The `gpt2` command.

To add a verb, write a function with `@app.command` in `cli.py` (pipeline), `models.py` or `operations.py`, or with
`@dataset_app.command` in `dataset.py` (writes) or `versions.py` (reads). Its keyword-only parameters become options,
with the help under Args in its docstring. `cli.py` must import a new module of verbs.
"""
