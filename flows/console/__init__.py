"""The `gpt2` command.

To add a verb, write one function with `@app.command` in `cli.py`, or with `@dataset_app.command` in `dataset.py`. Its
keyword-only parameters become options; their help is the text under Args in its docstring.
"""
