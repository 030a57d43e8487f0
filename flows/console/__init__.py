"""The `gpt2` command.

To add a verb, write a function in a module of this folder, and name both in a table of `cli.py`. Parameters before `/`
become arguments, keyword-only parameters options, with the help under Args in the docstring.
`settings: Settings = DEFAULTS` adds --config and --set.
"""
