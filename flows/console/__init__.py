"""The `gpt2` command.

A new verb is one function with `@app.command()`: in `cli.py`, or in `dataset.py` for `gpt2 dataset`.
"""
